"""Muon for matrices, AdamW for the rest: each as its paper and PyTorch have it, exactly resumed."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import OptimConfig
from shardprep_trainer.learning.build import build_optimizer
from shardprep_trainer.learning.muon import narrow_type, orthogonalise
from shardprep_trainer.learning.optimizer import MuonAdamW, split_weights
from shardprep_trainer.model.build import build_model

LR, DECAY = 0.01, 0.1
MATRICES = ("tall.weight", "wide.weight", "kernels.weight", "line.weight")


class Parts(nn.Module):
    """One weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(8, 24), nn.Linear(24, 6, bias=False)
        self.kernels = nn.Conv2d(4, 16, 3)
        self.line = nn.Conv1d(6, 5, 1)
        self.depthwise = nn.Conv1d(6, 6, 7, groups=6)
        self.table = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 1)
        self.head = nn.Linear(8, 5)


def make(seed: int = 0, decay: float = DECAY) -> tuple[Parts, MuonAdamW]:
    torch.manual_seed(seed)
    model = Parts()
    matrices, others = split_weights(model, model.head)
    return model, MuonAdamW(matrices, others, lr=LR, weight_decay=decay, fused=True)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def names(model: nn.Module, weights: list[Tensor]) -> set[str]:
    known = {id(weight): name for name, weight in model.named_parameters()}
    return {known[id(weight)] for weight in weights}


def test_only_matrices_within_the_network_are_matrices() -> None:
    model = Parts()
    matrices, others = split_weights(model, model.head)
    assert names(model, matrices) == set(MATRICES)
    assert len(matrices) + len(others) == len(list(model.parameters()))


@pytest.mark.parametrize("recipe", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_every_weight_of_every_recipe_moves_once(recipe: str) -> None:
    asked = ["--config", str(RECIPES / f"{recipe}.yaml"), "--data.shards", "shards"]
    narrow = ["--model.dim=32", "--model.ff_dim=64", "--model.heads=2", "--model.head_dim=16"]
    model = build_model(parse_args([*asked, *narrow]).config.model, 40, 7)
    optimizer = build_optimizer(OptimConfig(name="muon"), model, torch.device("cpu"))
    matrices, others = (group["params"] for group in optimizer.param_groups)
    assert sorted(map(id, matrices + others)) == sorted(map(id, model.parameters()))
    assert names(model, others) >= names(model, list(model.classifier.parameters()))
    assert sum(w.numel() for w in matrices) > sum(w.numel() for w in others) / 4
    assert all(weight.ndim >= 2 for weight in matrices)


def test_a_matrix_moves_by_the_nearest_orthogonal_one_as_far_as_adamw_would() -> None:
    model, optimizer = make()
    before = values(model)
    set_gradients(model, 1)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    optimizer.step()
    for (name, weight), was in zip(model.named_parameters(), before, strict=True):
        if name not in MATRICES:
            continue
        gradient = gradients[name]
        assert gradient is not None
        rows, columns = weight.flatten(1).shape
        moved = (was * (1 - LR * DECAY) - weight.detach()).flatten(1).double()
        moved /= LR * 0.2 * math.sqrt(max(rows, columns))
        left, _, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
        # In the singular directions of the gradient, by about the same along each.
        turned = left.T @ moved @ right.T
        sizes = turned.diagonal()
        assert (turned - torch.diag(sizes)).abs().max() < 0.06, name
        assert sizes.min() > 0.5, name
        assert sizes.max() < 1.3, name


@pytest.mark.parametrize(("rows", "columns"), [(8, 24), (24, 8), (12, 12)])
def test_singular_values_go_through_the_polynomial_and_directions_stay(
    rows: int, columns: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, rows, columns) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    exact = orthogonalise(x, torch.float32)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=0, atol=1e-5)
    rounded = orthogonalise(x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=0.03)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert orthogonalise(torch.randn(1, 3, 4)).dtype == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_without_bfloat16_computes_in_float16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert narrow_type(torch.device("cuda")) == dtype


def test_momenta_too_small_for_float16_have_the_same_directions_in_float16() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 24)
    exact = orthogonalise(x.double(), torch.float64)
    found = orthogonalise(x * 1e-9, torch.float16)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_matrices_and_kernels_move_as_pytorchs_muon_has_it(decay: float) -> None:
    model, optimizer = make(decay=decay)
    weights = [model.get_parameter(name) for name in MATRICES]
    before = [weight.detach().flatten(1).clone() for weight in weights]
    flat = [x.clone().requires_grad_() for x in before]
    options: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    plain = torch.optim.Muon(flat, lr=LR, weight_decay=decay, **options)
    for seed in range(8):
        set_gradients(model, seed)
        for weight, x in zip(weights, flat, strict=True):
            assert weight.grad is not None
            x.grad = weight.grad.flatten(1)
        optimizer.step()
        plain.step()
    for weight, x, was in zip(weights, flat, before, strict=True):
        # PyTorch rounds to bfloat16, and what is rounded may be multiplied in another order.
        difference = weight.detach().flatten(1) - x.detach()
        assert difference.norm() < 0.03 * (x.detach() - was).norm()


def test_the_rest_moves_as_pytorchs_adamw_has_it_to_the_bit() -> None:
    model, optimizer = make()
    reference = Parts()
    reference.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(reference, seed)
        optimizer.step()
        plain.step()
    others = names(model, split_weights(model, model.head)[1])
    other = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other[name]) == (name in others), name


@pytest.mark.parametrize("how", ["made", "loaded", "copied"])
def test_a_rate_set_between_steps_moves_both(how: str) -> None:
    model, optimizer = make()
    if how == "loaded":
        # As accelerate does it with every optimiser.
        optimizer.load_state_dict(optimizer.state_dict())
    elif how == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = values(model)
    set_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = LR
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_an_optimiser_from_a_file_goes_on_to_the_bit() -> None:
    model, optimizer = make()
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
    other, resumed = make(seed=9)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for seed in range(2, 4):
        for a, b in ((model, optimizer), (other, resumed)):
            set_gradients(a, seed)
            b.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    one, two = optimizer.state_dict(), resumed.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert len(one["state"]) == len(list(model.parameters()))


def test_the_moments_of_a_file_are_taken_into_one_piece_of_memory() -> None:
    model, optimizer = make()
    set_gradients(model, 0)
    optimizer.step()
    # As they were saved when each was a tensor of its own.
    state = copy.deepcopy(through_a_file(optimizer.state_dict()))
    for values_of in state["state"].values():
        if "momentum_buffer" in values_of:
            values_of["momentum_buffer"] = values_of["momentum_buffer"].clone()
    other, resumed = make(seed=9)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for seed in (1, 2):
        for a, b in ((model, optimizer), (other, resumed)):
            set_gradients(a, seed)
            b.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    momenta = [resumed.state[w]["momentum_buffer"] for w in resumed.param_groups[0]["params"]]
    assert len({momentum.untyped_storage().data_ptr() for momentum in momenta}) == 1


class Kernels(TorchDispatchMode):
    """Counts the operations run while entered, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(
            alias.alias_info and not alias.alias_info.is_write for alias in func._schema.returns
        ):
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_more_matrices_take_no_more_kernels_and_none_are_gathered() -> None:
    seen = []
    for number in (2, 7):
        model = nn.Sequential(
            *(nn.Linear(8, 8, bias=False) for _ in range(number)), nn.Linear(8, 1)
        )
        matrices, others = split_weights(model, model[-1])
        optimizer = MuonAdamW(matrices, others, lr=LR, weight_decay=DECAY, fused=True)
        for _ in range(2):
            set_gradients(model, 0)
            optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
            with Kernels() as kernels:
                optimizer.step()
        seen.append(kernels.seen)
    assert seen[0] == seen[1]
    assert not seen[0].keys() & {"stack", "cat"}
    assert seen[0]["_foreach_add_"] >= 3


def test_the_moments_of_another_optimiser_are_refused() -> None:
    model, optimizer = make()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("bad", [1.0, 2.0])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_step_that_must_not_count_is_as_if_it_had_never_been(bad: float, first: int) -> None:
    (model, optimizer), (plain, reference) = make(), make()
    for seed in range(3):
        if seed == first:
            for weight in model.parameters():
                weight.grad = torch.full_like(weight, math.nan)
            optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
            optimizer.step()
        set_gradients(model, seed)
        set_gradients(plain, seed)
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(values(model), values(plain), strict=True))


def test_a_gradient_scaler_need_not_wait_and_has_the_step_skipped() -> None:
    model, optimizer = make()
    before = values(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # Where it supports scaling, it is always called and told what was found.
    for gradient, moved in ((math.inf, False), (1.0, True)):
        scaler.scale(torch.zeros(()))
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(a, b) for a, b in zip(values(model), before, strict=True)]
        assert changed == [moved] * len(before)
    assert scaler.get_scale() == 2.0


def test_a_kernel_that_is_not_contiguous_is_refused_and_not_left_untrained() -> None:
    model, optimizer = make()
    model.to(memory_format=torch.channels_last)
    set_gradients(model, 0)
    with pytest.raises(RuntimeError, match="view"):
        optimizer.step()


def test_without_any_gradient_nothing_happens() -> None:
    model, optimizer = make()
    before = values(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_weights_without_a_gradient_stay() -> None:
    model, optimizer = make()
    set_gradients(model, 0)
    model.tall.weight.grad = None
    before = values(model)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(values(model), before, strict=True)]
    still = [name for (name, _), x in zip(model.named_parameters(), moved, strict=True) if not x]
    assert still == ["tall.weight"]
