"""The promise of docs/api_stability.md: the public names, their signatures, and states of earlier versions.

``python tests/test_api.py`` writes ``api_signatures.txt`` anew, after a change that is meant.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import s2d
from s2d import SelectiveSpectralDecay, SpectralNormCap

ROOT = Path(__file__).resolve().parents[1]
PROMISE = ROOT / "docs" / "api_stability.md"
SNAPSHOT = Path(__file__).with_name("api_signatures.txt")
STATES = Path(__file__).with_name("states")


def parameters(function: Any) -> str:
    """The signature; without the types of parameters, which may be told more exactly and break nobody."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            found.append("*")
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.default is not inspect.Parameter.empty:
            text += f"={parameter.default!r}"
        found.append(text)
    returned = inspect.signature(function).return_annotation
    return f"({', '.join(found)})" + ("" if returned is inspect.Signature.empty else f" -> {returned}")


def described(name: str, thing: Any) -> Iterator[str]:
    """A public name, one line for it and one for each part that a caller can use."""
    if not inspect.isclass(thing):
        yield f"{name}{parameters(thing)}"
        return
    fields = getattr(thing, "_fields", None)
    if fields is not None:
        yield f"{name}: " + ", ".join(fields)  # a named tuple is taken apart in this order
    else:
        yield f"{name}{parameters(thing.__init__).removesuffix(' -> None')}"
    for part in sorted(dir(thing)):
        value = inspect.getattr_static(thing, part)
        ours = any(part in vars(base) and base.__module__.startswith("s2d.") for base in thing.__mro__)
        if part.startswith("_") or not ours or part in (fields or ()):
            continue
        if isinstance(value, property):
            yield f"{name}.{part} -> {inspect.signature(value.fget).return_annotation}"
        elif callable(value) or isinstance(value, (classmethod, staticmethod)):
            yield f"{name}.{part}{parameters(getattr(thing, part))}"


def snapshot() -> str:
    return "\n".join(line for name in sorted(s2d.__all__) for line in described(name, getattr(s2d, name))) + "\n"


def promised() -> list[str]:
    section = PROMISE.read_text(encoding="utf-8").partition("## Public names")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


def test_the_promise_lists_what_the_package_exports() -> None:
    assert sorted(promised()) == sorted(s2d.__all__)
    assert all(hasattr(s2d, name) for name in promised())
    assert len(set(promised())) == len(promised())


def test_the_public_signatures_are_those_of_the_snapshot() -> None:
    now, kept = snapshot().splitlines(), SNAPSHOT.read_text(encoding="utf-8").splitlines()
    gone, new = sorted(set(kept) - set(now)), sorted(set(now) - set(kept))
    assert not gone, (
        "the public API changed in a way that may break callers:\n  - "
        + "\n  - ".join(gone)
        + "".join(f"\n  + {line}" for line in new)
        + "\nKeep the old call working, with a DeprecationWarning (docs/api_stability.md says how long); if the change "
        "only adds what has a default, or the deprecation has run out, write it into CHANGELOG.md and then "
        "python tests/test_api.py"
    )
    assert not new, (
        "new in the public API, to be kept from now on: python tests/test_api.py, and a line in CHANGELOG.md"
    )


def test_the_snapshot_sees_what_breaks_callers() -> None:
    def before(x: int, *, tol: float = 1.0) -> int: ...
    def renamed(x: int, *, tolerance: float = 1.0) -> int: ...
    def other_default(x: int, *, tol: float = 2.0) -> int: ...
    def positional(x: int, tol: float = 1.0) -> int: ...

    class Before(typing.NamedTuple):
        u: int
        s: int

    class Swapped(typing.NamedTuple):
        s: int
        u: int

    lines = [list(described("f", f)) for f in (before, renamed, other_default, positional)]
    assert len({tuple(line) for line in lines}) == 4
    assert list(described("T", Before)) != list(described("T", Swapped))


def test_type_checkers_are_told_that_the_package_is_annotated() -> None:
    assert (ROOT / "s2d" / "py.typed").is_file()


# --- states -----------------------------------------------------------------------------------------------------------


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def decay(kind: str, model: nn.Module) -> SelectiveSpectralDecay:
    options: dict = {"criterion": "all", "k_max": 2, "refresh_every": 2, "lam": 0.1}
    if kind == "bfloat16":
        options |= {"coupling": "decoupled", "coefficients": "live"}
    return SelectiveSpectralDecay(model, **options)


def trained(kind: str) -> SelectiveSpectralDecay:
    """Three steps: what the stored states are of (made by 0.1.0 with exactly these lines)."""
    model = layers(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = decay(kind, model)
    found.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("version", ["0.1.0"])
def test_a_state_of_an_earlier_version_is_read(kind: str, version: str) -> None:
    state = load_file(STATES / f"decay_{kind}_{version}.safetensors")
    now = decay(kind, layers(torch.bfloat16 if kind == "bfloat16" else torch.float32))
    now.load_state_dict(state)
    assert now.steps == 3 and [row["rank"] for row in now.report()] == [2, 2]
    again = now.state_dict()
    assert again.keys() >= state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert state.keys() == trained(kind).state_dict().keys()  # what is written today; more keys are a new format


def test_the_state_of_a_cap_of_an_earlier_version_is_read() -> None:
    cap = SpectralNormCap(layers(), cap=1.0)
    cap.load_state_dict(load_file(STATES / "cap_0.1.0.safetensors"))
    assert cap.steps == 3


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    print(f"written: {SNAPSHOT}; say in CHANGELOG.md what changed")
