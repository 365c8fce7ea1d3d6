"""The cosine head multiplies in full float32, whatever the process allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from shardprep_trainer.model.model import CosineClassifier
from shardprep_trainer.model.precision import allow_tensor_float32, exact_product


@pytest.fixture(autouse=True)
def _setting_of_the_process() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is allowed whenever two matrices are multiplied."""
    found: list[str] = []
    multiply = Tensor.__matmul__

    def note(one: Tensor, other: Tensor) -> Tensor:
        found.append(torch.get_float32_matmul_precision())
        return multiply(one, other)

    monkeypatch.setattr(Tensor, "__matmul__", note)
    return found


def test_the_products_of_the_head_are_exact_and_no_others(allowed: list[str]) -> None:
    allow_tensor_float32()
    features, directions = (torch.randn(size, 8, requires_grad=True) for size in (3, 5))
    exact_product(features, directions).sum().backward()
    assert allowed == ["highest"] * 3
    features @ directions.T
    assert allowed[3:] == ["high"]


def test_it_is_a_product_with_its_gradients() -> None:
    features, directions = (
        torch.randn(size, 8, dtype=torch.float64, requires_grad=True) for size in (3, 5)
    )
    torch.testing.assert_close(exact_product(features, directions), features @ directions.T)
    assert torch.autograd.gradcheck(exact_product, (features, directions))


def test_what_was_allowed_is_restored_after_an_error() -> None:
    allow_tensor_float32()
    with pytest.raises(RuntimeError):
        exact_product(torch.randn(3, 8), torch.randn(5, 7))
    assert torch.get_float32_matmul_precision() == "high"


def test_a_compiler_keeps_it_whole_with_its_gradients(allowed: list[str]) -> None:
    kept: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        kept.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    allow_tensor_float32()
    features, directions = (torch.randn(size, 8, requires_grad=True) for size in (3, 5))
    compiled = torch.compile(exact_product, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    compiled(features, directions).sum().backward()
    assert [sum("exact_product" in name for name in names) for names in kept] == [1, 2]
    assert not any("mm" in name for names in kept for name in names)
    # The setting is that of the moment at which the product runs.
    assert allowed == ["highest"] * 3
    torch.testing.assert_close(features.grad, directions.detach().sum(0).expand(3, 8))
    found = torch.library.opcheck(torch.ops.shardprep.exact_product.default, (features, directions))
    assert set(found.values()) == {"SUCCESS"}
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cosines_on_a_gpu_are_right_to_float32(compiled: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    allow_tensor_float32()
    classifier = CosineClassifier(512, 600).cuda()
    head = torch.compile(classifier) if compiled else classifier
    embedding = torch.randn(64, 512, device="cuda", requires_grad=True)
    grad = torch.randn(64, 600, device="cuda")
    found = head(embedding)
    wanted = (embedding, classifier.weight)
    gradients = torch.autograd.grad(found, wanted, grad)

    def cosines(embedding: Tensor, weight: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize
        return unit(embedding, dim=1) @ unit(weight, dim=1).T

    exact = [x.detach().double().requires_grad_() for x in wanted]
    expected = cosines(*exact)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert (cosines(*wanted).double() - expected).abs().max() > 1e-5, "TensorFloat-32 was not used"
    for one, other in zip(
        gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)
