"""The optimizers of appendix C's references against torch's own, closed forms, and themselves after an interruption."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import (
    Capped,
    LessAdaptive,
    MuonAndAdamW,
    Orthogonal,
    RotatedAdamW,
    RotatedBasis,
    random_rotation,
)
from s2d.lab.recipes import INTERVENTIONS, intervention, pretraining
from s2d.lab.training import Optimizer, Recipe, train

TINY = Recipe(seed=0, steps=6, warmup=2, batch_size=8, model=DigitsViT(width=16, depth=2, heads=2), measure_every=4)
VECTOR, MATRIX, KERNEL, BATCHED_VECTOR = (5,), (4, 6), (4, 2, 3, 3), (1, 3, 7)
SHAPES = {"vector": VECTOR, "matrix": MATRIX, "kernel": KERNEL, "batched vector": BATCHED_VECTOR}
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}


def random_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES.values()]


def random_gradients(steps: int, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES.values()] for _ in range(steps)]


def follow(optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The parameters after one step a list of gradients."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone().to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- rotated basis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9])
def test_rotations_are_orthogonal_and_of_both_signs(n):
    rotations = torch.stack([random_rotation(n, torch.Generator().manual_seed(seed)) for seed in range(200)])
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(n).expand_as(rotations), rtol=0, atol=1e-5)
    # Uniform over all orthogonal matrices: every entry has mean 0 and mean square 1/n.
    assert rotations.mean(0).abs().max() < 5 / (200 * n) ** 0.5
    torch.testing.assert_close(rotations.square().mean(0), torch.full((n, n), 1 / n), rtol=0.6, atol=0)


def test_identity_rotations_give_torchs_adamw():
    ours, torchs = random_parameters(), random_parameters()
    optimizer = RotatedAdamW(ours, **OPTIONS)
    for parameter, (left, right) in optimizer._rotations.items():
        optimizer._rotations[parameter] = (None if left is None else torch.eye(len(left)), torch.eye(len(right)))
    gradients = random_gradients(5)
    expected = follow(torch.optim.AdamW(torchs, **OPTIONS), torchs, gradients)
    assert_all_close(follow(optimizer, ours, gradients), expected, rtol=0, atol=0)


def test_it_is_adamw_on_rotated_parameters():
    """The oracle rotates by hand, each shape spelled out, and lets torch's AdamW stay in the rotated space."""
    ours = random_parameters()
    optimizer = RotatedAdamW(ours, rotation_seed=3, **OPTIONS)
    (_, r_vector), (l_matrix, r_matrix), (l_kernel, r_kernel), (_, r_batched) = optimizer._rotations.values()
    assert [len(q) for q in (r_vector, l_matrix, r_matrix, l_kernel, r_kernel, r_batched)] == [5, 4, 6, 4, 18, 7]

    def there(tensors: list[Tensor]) -> list[Tensor]:
        vector, matrix, kernel, batched = tensors
        return [
            torch.einsum("i,ij->j", vector, r_vector),
            torch.einsum("ab,bi,ij->aj", l_matrix, matrix, r_matrix),
            torch.einsum("ab,bi,ij->aj", l_kernel, kernel.reshape(4, 18), r_kernel).reshape(KERNEL),
            torch.einsum("nti,ij->ntj", batched, r_batched),
        ]

    rotated = [nn.Parameter(tensor) for tensor in there([p.detach() for p in ours])]
    gradients = random_gradients(5)
    expected = follow(torch.optim.AdamW(rotated, **OPTIONS), rotated, [there(step) for step in gradients])
    assert_all_close(there(follow(optimizer, ours, gradients)), expected, rtol=1e-4, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in zip(SHAPES, ours, strict=True)} == SHAPES


def test_an_optimizer_that_treats_no_coordinate_apart_cannot_tell_the_basis():
    """A huge eps turns AdamW into momentum SGD, which commutes with rotations; a small one does not."""
    gradients = random_gradients(4)
    for eps, invariant in ((1e6, True), (1e-8, False)):
        plain, rotated = random_parameters(), random_parameters()
        options = {"lr": 0.01 * max(eps, 1), "eps": eps}  # the step is lr * m / eps
        expected = follow(torch.optim.AdamW(plain, weight_decay=0.0, **options), plain, gradients)
        actual = follow(RotatedAdamW(rotated, weight_decay=0.0, **options), rotated, gradients)
        close = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(actual, expected, strict=True))
        assert close == invariant


def test_parameters_without_gradient_stay_bit_for_bit():
    parameters = random_parameters()
    before = parameters[1].detach().clone()
    optimizer = RotatedAdamW(parameters, **OPTIONS)
    parameters[0].grad = torch.ones(VECTOR)
    optimizer.step()
    assert torch.equal(parameters[1], before)


def test_a_closure_sees_the_usual_basis():
    parameter = nn.Parameter(torch.arange(4.0))
    optimizer = RotatedAdamW([parameter], **OPTIONS)
    seen = []

    def closure() -> Tensor:
        seen.append(parameter.detach().clone())
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 14.0
    assert torch.equal(seen[0], torch.arange(4.0))


def test_the_rotations_are_a_function_of_their_seed():
    one, same, other = (RotatedAdamW(random_parameters(), rotation_seed=s, **OPTIONS) for s in (1, 1, 2))
    first = [next(iter(o._rotations.values()))[1] for o in (one, same, other)]
    assert torch.equal(first[0], first[1]) and not torch.allclose(first[0], first[2])


# --- less adaptive ----------------------------------------------------------------------------------------------------


def test_with_a_large_eps_the_step_is_lr_times_momentum_over_eps():
    model = TINY.model.build(0)
    eps, lr = 1e4, 10.0
    optimizer = LessAdaptive("adamw", lr=lr, weight_decay=0.0, betas=(0.9, 0.99), eps=eps).build(model)
    weight = model.blocks[0].mlp.fc1.weight
    start, momentum = weight.detach().clone(), torch.zeros_like(weight)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for step in range(1, 4):
        before = weight.detach().clone()
        weight.grad = step * gradient
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * step * gradient
        unbiased = momentum / (1 - 0.9**step)
        torch.testing.assert_close(weight - before, -lr * unbiased / eps, rtol=2e-3, atol=2e-7)
    assert not torch.equal(weight, start)


def test_torchs_eps_gives_the_plain_recipe():
    models = [TINY.model.build(0) for _ in range(2)]
    recipes = LessAdaptive("adamw", eps=1e-8), Optimizer("adamw")
    for model, recipe in zip(models, recipes, strict=True):
        optimizer = recipe.build(model)
        model(TINY.data.training_batch(4, seed=0, step=0)[0]).square().sum().backward()
        optimizer.step()
    assert_all_close(list(models[0].parameters()), list(models[1].parameters()), rtol=0, atol=0)


# --- Muon -------------------------------------------------------------------------------------------------------------


def muon_of(model: nn.Module) -> MuonAndAdamW:
    return Orthogonal("adamw", lr=0.01).build(model)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = TINY.model.build(0)
    muon, adamw = muon_of(model).parts
    names = {id(p): name for name, p in model.named_parameters()}
    parts = [{names[id(p)] for group in part.param_groups for p in group["params"]} for part in (muon, adamw)]
    matrices = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert parts[0] == {f"blocks.{i}.{m}.weight" for i in range(2) for m in matrices}
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == {name for name, p in model.named_parameters() if p.requires_grad}


def test_muons_first_step_has_all_singular_values_alike():
    model = TINY.model.build(0)
    optimizer = muon_of(model)
    weight = model.blocks[0].mlp.fc1.weight
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    given = torch.linalg.svdvals(weight.grad)
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach() - before)
    # Newton-Schulz leaves them near 1 (times the learning rate), not at 1.
    assert values.max() / values.min() < 2 < given.max() / given.min()


def test_muons_state_goes_round_bit_for_bit():
    def run(model: nn.Module, optimizer: MuonAndAdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(TINY.data.training_batch(4, seed=0, step=step)[0]).square().sum().backward()
            optimizer.step()

    model = TINY.model.build(0)
    optimizer = muon_of(model)
    run(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = muon_of(other)
    state = copy.deepcopy(optimizer.state_dict())
    indices = [i for group in state["param_groups"] for i in group["params"]]
    assert len(state["state"]) == len(indices) == sum(p.requires_grad for p in model.parameters())
    resumed.load_state_dict(state)
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert_all_close(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)


# --- cap --------------------------------------------------------------------------------------------------------------


def test_the_cap_holds_after_a_projection():
    recipe = replace(TINY, steps=4, warmup=1, optimizer=Capped("adamw", lr=0.05, cap=0.3, cap_every=2))
    assert largest_singular_value(train(recipe)[0]) <= 0.3 * 1.01  # the weights are rounded to half precision
    free = replace(recipe, optimizer=Optimizer("adamw", lr=0.05))
    assert largest_singular_value(train(free)[0]) > 0.35
    # After an odd number of steps the last one is not yet projected.
    assert largest_singular_value(train(replace(recipe, steps=3))[0]) > 0.3 * 1.01


def largest_singular_value(weights: dict[str, Tensor]) -> float:
    matrices = [t for name, t in weights.items() if name.startswith("blocks.") and t.ndim == 2]
    return max(torch.linalg.svdvals(matrix.float())[0].item() for matrix in matrices)


# --- training and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        RotatedBasis("adamw"),
        LessAdaptive("adamw", eps=1e-3),
        Orthogonal("adamw"),
        Capped("adamw", lr=0.05, cap=0.3, cap_every=3),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(optimizer, stop, tmp_path):
    recipe = replace(TINY, optimizer=optimizer)
    weights, history = train(recipe)
    partial, done = tmp_path / "run.partial", 0

    def interrupt(steps: int) -> None:
        nonlocal done
        done += steps
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run again to resume"):
        train(recipe, partial=partial, save_every=2, progress=interrupt)
    assert partial.exists()
    resumed, resumed_history = train(recipe, partial=partial, save_every=2)
    assert resumed_history == history and not partial.exists()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_intervention_changes_the_optimizer_alone(name):
    base = pretraining("sgd" if name == "SGD" else "adamw", seed=4, steps=9)
    assert replace(intervention(name, seed=4, steps=9), optimizer=base.optimizer) == base


def test_the_interventions_differ_from_each_other():
    assert len({str(optimizer) for optimizer in INTERVENTIONS.values()}) == len(INTERVENTIONS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LessAdaptive("adamw", eps=0.0), "eps is 0.0: it must be positive"),
        (lambda: LessAdaptive("adamw", eps=float("nan")), "eps is nan"),
        (lambda: Capped("adamw", cap=0.0), "cap=0.0 must be positive"),
        (lambda: Capped("adamw", cap_every=0), "cap_every=0 at least 1"),
        (lambda: RotatedBasis("adam"), "unknown optimizer 'adam'"),
        (lambda: Orthogonal("adamw", lr=-1.0), "lr is -1.0"),
        (lambda: intervention("Adam", seed=0), "unknown intervention 'Adam': choose one of AdamW, "),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
