"""What an embedding may depend on, what a prediction is, and which models can be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.learning.losses import AMSoftmaxLoss, SoftmaxLoss
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import CosineClassifier, Embedding, SpeakerNetwork

CONFORMER = {
    "encoder": "conformer",
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "ff_dim": 32,
    "kernel_size": 7,
    "pooling": "self_attentive",
    "classifier": "cosine",
}
TRANSFORMER = {
    "encoder": "transformer",
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "ff_dim": 24,
    "pooling": "mean",
    "classifier": "mlp",
}
LINEAR = {**CONFORMER, "pooling": "mean", "classifier": "linear"}
MFA = {
    **CONFORMER,
    "pooling": "attentive_statistics",
    "center": True,
    "subsampling": 2,
    "concat": True,
    "embedding_dim": 12,
}
STEM = {**CONFORMER, "stem_channels": 4}
HALF_STEM = {**MFA, "stem_channels": 3}
TRUNK_OPTIONS = {
    "channels": [4, 6, 8],
    "blocks": [1, 2, 1],
    "time_strides": [1, 2, 1],
    "mel_strides": [1, 2, 2],
}
TRUNK = {
    "encoder": "shardprep_trainer.model.trunk:ResNet",
    "encoder_options": TRUNK_OPTIONS,
    "dim": 16,
    "pooling": "attentive_statistics",
    "embedding_dim": 12,
}
HYBRID = {
    **TRUNK,
    "encoder": "shardprep_trainer.model.trunk:ResNetConformer",
    "encoder_options": {"dim": 16, "layers": 2, "heads": 2, "dropout": 0.0, **TRUNK_OPTIONS},
}
# Of these there are layers that drop values.
WITH_DROPOUT = ("conformer", "transformer", "linear", "mfa", "stem", "half stem")
MODELS = {
    "trunk": TRUNK,
    "hybrid": HYBRID,
    "conformer": CONFORMER,
    "transformer": TRANSFORMER,
    "linear": LINEAR,
    "mfa": MFA,
    "stem": STEM,
    "half stem": HALF_STEM,
}
CONV = {"conv_expansion": 2, "kernel_size": 31, "head_dim": 64, "ff_dim": 2048}
STRONG = {"encoder": "conformer", "dim": 512, "layers": 1, "heads": 8, **CONV}
MEDIUM = {"encoder": "transformer", "dim": 160, "layers": 2, "heads": 8, "ff_dim": 256}
SIMPLE = {"encoder": "transformer", "dim": 80, "layers": 1, "heads": 2, "ff_dim": 256}
RECIPES = {
    "simple": {**SIMPLE, "pooling": "mean", "classifier": "mlp"},
    "medium": {**MEDIUM, "pooling": "mean", "classifier": "linear"},
    "strong": {**STRONG, "pooling": "mean", "classifier": "linear"},
    "boss": {**STRONG, "pooling": "self_attentive", "classifier": "cosine"},
}


def build(name: str, *, seed: int = 0, dropout: float = 0.0, **changes: Any) -> SpeakerNetwork:
    torch.manual_seed(seed)
    config = ModelConfig(**{**MODELS[name], "dropout": dropout, **changes})
    return build_model(config, 40, 5)


def padded(utterances: list[Tensor], value: float = torch.nan) -> tuple[Tensor, Tensor]:
    mel = nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=value)
    return mel, torch.tensor([len(u) for u in utterances])


@pytest.mark.parametrize("name", RECIPES)
def test_the_four_recipes_of_the_homework_can_be_built(name: str) -> None:
    model = build_model(ModelConfig(dropout=0.1, **RECIPES[name]), 40, 600)
    mel = torch.randn(2, 24, 40)
    assert model(mel).shape == (2, 600)
    assert model.embed(mel, torch.tensor([24, 9])).shape == (2, RECIPES[name]["dim"])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


@pytest.mark.parametrize("name", MODELS)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_an_embedding_is_the_same_alone_padded_and_in_company(
    name: str, lengths: list[int], seed: int
) -> None:
    model = build(name, seed=seed).eval()
    utterances = [torch.randn(length, 40) * 3 - 8 for length in lengths]
    with torch.no_grad():
        together = model.embed(*padded(utterances))
        for embedding, utterance in zip(together, utterances, strict=True):
            alone = model.embed(utterance[None])[0]
            more = padded([utterance, torch.randn(60, 40)], value=1e4)
            torch.testing.assert_close(embedding, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(model.embed(*more)[0], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_training_sees_nothing_of_what_padding_holds(name: str) -> None:
    utterances = [torch.randn(length, 40) for length in (30, 4, 17)]
    labels = torch.tensor([0, 3, 1])
    results = []
    for value in (0.0, torch.nan, 1e4):
        model = build(name).train()
        loss = SoftmaxLoss()(model(*padded(utterances, value)), labels)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_full_lengths_are_no_lengths(name: str) -> None:
    model = build(name).train()
    mel = torch.randn(3, 20, 40)
    with_lengths = model(mel, torch.full((3,), 20))
    torch.testing.assert_close(model(mel), with_lengths, atol=1e-5, rtol=0)


def test_the_order_of_frames_changes_the_embedding_of_a_conformer() -> None:
    model = build("conformer").eval()
    mel = torch.randn(1, 40, 40)
    with torch.no_grad():
        moved = model.embed(mel.flip(1)) - model.embed(mel)
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_works_in_training_and_rests_in_evaluation(name: str) -> None:
    model = build(name, dropout=0.5).train()
    mel = torch.randn(2, 20, 40)
    assert not torch.equal(model(mel), model(mel))
    model.eval()
    assert torch.equal(model(mel), model(mel))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_of_any_dtype_are_taken(name: str, dtype: torch.dtype) -> None:
    model = build(name).eval()
    mel = torch.randn(2, 20, 40).to(dtype)
    assert torch.equal(model(mel), model(mel.float()))


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_scores_are_float32_under_autocast(name: str) -> None:
    model = build(name).train()
    mel, lengths = padded([torch.randn(30, 40), torch.randn(9, 40)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding, scores = model.embed(mel, lengths), model(mel, lengths)
    assert embedding.dtype == scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_cosines_equal_their_definition_even_under_autocast() -> None:
    classifier = CosineClassifier(16, 5)
    embedding = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = classifier(embedding)
    for b in range(3):
        for s in range(5):
            x, w = embedding[b].double(), classifier.weight[s].double()
            expected = (x @ w / (x.norm() * w.norm())).item()
            assert found[b, s].item() == pytest.approx(expected, abs=1e-6)


@given(feature_scale=st.floats(1e-3, 1e3), weight_scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_cosines_ignore_the_lengths_of_features_and_weights(
    feature_scale: float, weight_scale: float
) -> None:
    classifier = CosineClassifier(16, 5).double()
    embedding = torch.randn(3, 16, dtype=torch.float64)
    expected = classifier(embedding)
    classifier.weight.data *= weight_scale
    torch.testing.assert_close(classifier(embedding * feature_scale), expected)


def test_the_gradient_of_cosines_is_right() -> None:
    classifier = CosineClassifier(4, 3).double()
    embedding = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def cosines(embedding: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(classifier, {"weight": weight}, (embedding,))

    assert torch.autograd.gradcheck(cosines, (embedding, classifier.weight))


def test_the_optimiser_sees_and_moves_the_weights_of_the_speakers() -> None:
    model = build("conformer")
    names = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    assert names == ["classifier.weight"]
    before = model.classifier.weight.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    AMSoftmaxLoss()(model(torch.randn(4, 20, 40)), torch.tensor([0, 1, 2, 3])).backward()
    optimiser.step()
    assert (model.classifier.weight - before).abs().amax(1).min() > 1e-4
    assert not list(AMSoftmaxLoss().parameters())


def test_a_prediction_bears_no_margin_whatever_the_label() -> None:
    model = build("conformer").eval()
    mel = torch.randn(8, 20, 40)
    with torch.no_grad():
        scores = model(mel)
        cosines = F.normalize(model.embed(mel)) @ F.normalize(model.classifier.weight).T
        AMSoftmaxLoss(margin=0.9)(scores, cosines.argmax(1))
    torch.testing.assert_close(scores, cosines, atol=1e-6, rtol=0)
    assert torch.equal(scores.argmax(1), cosines.argmax(1))


class NoHostReads(TorchDispatchMode):
    """Refuses the operations for which a host waits for its device: values, and shapes of them."""

    refused = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.refused, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_no_value_is_read_from_the_device(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a CPU does in its own way may look: there is no device to wait for.
    monkeypatch.setattr("shardprep_trainer.model.cpu_kernels.applies_to", lambda x: False)
    model = build(name).train(training)
    mel, lengths = padded([torch.randn(300, 40), torch.randn(9, 40)])
    with NoHostReads():
        model(mel, lengths).sum().backward()
    with pytest.raises(AssertionError), NoHostReads():
        bool(lengths.max() == 300)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_lengths", [True, False])
def test_an_empty_batch_gives_every_parameter_a_zero_gradient(
    name: str, with_lengths: bool
) -> None:
    model = build(name).train()
    none = torch.zeros(0, dtype=torch.long)
    scores = model(torch.zeros(0, 20, 40), none if with_lengths else None)
    AMSoftmaxLoss()(scores, none).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "pooling: found 'max'; allowed: mean, self_attentive"),
        ({"classifier": "svm"}, "classifier: found 'svm'; allowed: linear, mlp, cos"),
    ],
)
def test_a_model_that_cannot_be_says_what_was_found_and_is_allowed(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build("conformer", **changes)


def test_heads_of_a_conformer_may_be_wider_than_their_share() -> None:
    model = build("conformer", heads=3, head_dim=10)
    assert model.encoder.blocks[0].attn.fn.to_q.out_features == 30


def test_all_blocks_reach_the_embedding_of_joined_outputs() -> None:
    model = build("mfa", layers=3).eval()
    seen: list[Tensor] = []
    model.encoder.joined_norm.register_forward_hook(
        lambda module, given, out: seen.append(given[0])
    )
    outputs: list[Tensor] = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, given, out: outputs.append(out))
    assert model.embed(torch.randn(2, 21, 40)).shape == (2, 12)
    assert seen[0].shape == (2, 11, 48)
    assert torch.equal(seen[0], torch.cat(outputs, dim=2))


@pytest.mark.parametrize("name", ["mfa", "conformer"])
def test_centring_removes_a_fixed_filter_of_the_channel(name: str) -> None:
    model = build(name, center=True).eval()
    mel, lengths = padded([torch.randn(30, 40), torch.randn(17, 40)])
    filtered = mel + 3 * torch.randn(2, 1, 40)
    embedding = model.embed(mel, lengths)
    torch.testing.assert_close(model.embed(filtered, lengths), embedding, atol=1e-4, rtol=0)
    other = build(name, center=False).eval()
    assert (other.embed(filtered, lengths) - other.embed(mel, lengths)).abs().max() > 1e-2


def test_an_embedding_layer_equals_batch_norm_and_a_matrix() -> None:
    layer = Embedding(6, 4).train()
    oracle = nn.Sequential(nn.BatchNorm1d(6), layer.linear)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), oracle(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.norm.running_var, oracle[0].running_var)
    assert layer(x[:1]).isfinite().all()
