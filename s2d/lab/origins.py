"""Where outliers come from: what the optimizer changes, where in the network they sit, what grows with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s2d.lab.evaluate import CALIBRATION_IMAGES, Checkpoints, each, layer_statistics
from s2d.lab.frontier import frontier_table
from s2d.lab.optimizers import LessAdaptive
from s2d.lab.quantization import TEST_IMAGES
from s2d.lab.statistics import paired_interval
from s2d.lab.training import Optimizer
from s2d.layers import linear_maps
from s2d.outliers import excess_kurtosis

KNOBS = ("eps", "beta2")
PAIRS = (
    ("sigma_1", "max_abs"),
    ("sigma_1", "excess_kurtosis"),
    ("pcdr_1", "max_abs"),
    ("pcdr_1", "excess_kurtosis"),
    ("bound", "max_abs"),
)
"""What :func:`correlation_table` correlates, columns of :func:`growth_table`."""
LAYER_PAIRS = (("sigma_1", "max_abs"), ("pcdr_1", "max_abs"), ("spectral_pcdr_1", "max_abs"))
"""What :func:`layer_correlation_table` correlates, columns of :func:`s2d.lab.evaluate.layer_table`."""


# --- what the optimizer changes ---------------------------------------------------------------------------------------


def at_accuracy(history: Sequence[dict[str, float]], level: float) -> dict[str, float]:
    """The measurements of a training run where its validation accuracy first reaches a level.

    Between the last measurement below the level and the first that is not, everything is taken to change linearly.

    Args:
        history: rows of ``Trained.history``, in order.
        level: validation accuracy, 0 to 1.

    Returns:
        Name to value, as in a row of the history; ``validation_accuracy`` is the level, or more when the first
        measurement is.

    Raises:
        ValueError: if the run never reaches the level.

    Example:
        >>> run = [{"step": 0, "validation_accuracy": 0.1}, {"step": 100, "validation_accuracy": 0.5}]
        >>> round(at_accuracy(run, 0.3)["step"], 6)
        50.0

    Paper: appendix C.
    """
    after = next((i for i, row in enumerate(history) if row["validation_accuracy"] >= level), None)
    if after is None:
        best = max((row["validation_accuracy"] for row in history), default=0.0)
        raise ValueError(f"validation accuracy {level} is never reached, only {best}: compare at that or train longer")
    if after == 0:
        return dict(history[0])
    low, high = history[after - 1], history[after]
    rise = high["validation_accuracy"] - low["validation_accuracy"]
    weight = (level - low["validation_accuracy"]) / rise
    return {name: (1 - weight) * low[name] + weight * high[name] for name in high}


def _adaptivity(optimizer: Optimizer) -> dict[str, float]:
    """The doses of AdamW's adaptivity; not defined for an optimizer that differs from AdamW in more than them."""
    if type(optimizer) not in (Optimizer, LessAdaptive) or optimizer.name != "adamw":
        return {"eps": float("nan"), "beta2": float("nan")}
    return {"eps": getattr(optimizer, "eps", LessAdaptive.eps), "beta2": optimizer.betas[1]}


def powers_of_ten(kurtosis: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """Decimal logarithm of an excess kurtosis: that of one seed is many times another's, so ratios are compared.

    Args:
        kurtosis: excess kurtoses; what is below 0.01, zero up to the sample, counts as 0.01.

    Example:
        >>> powers_of_ten(pd.Series([100.0, 0.1, -0.2])).round(3).tolist()
        [2.0, -1.0, -2.0]
    """
    return np.log10(kurtosis.clip(lower=0.01))


def matched_table(checkpoints: Checkpoints) -> pd.DataFrame:
    """Outliers of every training run at the validation accuracy that all runs of its seed reach, and at its end.

    That accuracy is the least of their best measurements; one for all seeds would be set by the single worst run, and
    which that is depends on the processor. See :func:`at_accuracy` for how a run is read there.

    Args:
        checkpoints: variant to one checkpoint a seed.

    Returns:
        Two rows a run, columns variant, seed, lr, eps, beta2 (of plain AdamW, else NaN), moment ("matched", "end"),
        step, validation_accuracy, excess_kurtosis, neuron_kurtosis, max_abs.

    Raises:
        ValueError: without checkpoints.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> table = matched_table({"AdamW": obtain([pretraining("adamw", seed=0)])})
        >>> table.moment.tolist()
        ['matched', 'end']

    Paper: appendix C.
    """
    runs = list(each(checkpoints))
    if not runs:
        raise ValueError("no checkpoints to compare: give at least one a variant")
    levels: dict[int, float] = {}
    for _, trained in runs:
        best = max(row["validation_accuracy"] for row in trained.history)
        levels[trained.seed] = min(best, levels.get(trained.seed, best))
    measured = ["step", "validation_accuracy", "excess_kurtosis", "neuron_kurtosis", "max_abs"]
    rows = []
    for variant, trained in runs:
        optimizer = trained.recipe.optimizer
        run = {"variant": variant, "seed": trained.seed, "lr": optimizer.lr} | _adaptivity(optimizer)
        for moment, row in (
            ("matched", at_accuracy(trained.history, levels[trained.seed])),
            ("end", trained.history[-1]),
        ):
            rows.append(run | {"moment": moment} | {name: row[name] for name in measured})
    return pd.DataFrame(rows)


def dose_table(matched: pd.DataFrame, *, baseline: str = "AdamW") -> pd.DataFrame:
    """The runs that differ from the baseline in ``eps`` alone, and those that differ in ``beta2`` alone.

    Args:
        matched: from :func:`matched_table`.
        baseline: the variant that belongs to both series.

    Returns:
        The rows of each series with columns knob ("eps" or "beta2") and dose, ordered by dose.

    Raises:
        ValueError: if the baseline is not in the table, or is no plain AdamW.

    Example:
        >>> run = {"seed": 0, "lr": 0.01, "beta2": 0.99, "excess_kurtosis": 1.0}
        >>> table = pd.DataFrame([run | {"variant": "AdamW", "eps": 1e-8}, run | {"variant": "less", "eps": 1e-3}])
        >>> dose_table(table)[["knob", "dose"]].values.tolist()
        [['eps', 1e-08], ['eps', 0.001], ['beta2', 0.99]]

    Paper: appendix C, reference [7].
    """
    reference = matched[matched.variant == baseline]
    if reference.empty or reference[list(KNOBS)].isna().any(axis=None):
        raise ValueError(f"baseline {baseline!r} is no AdamW of this table: choose one of {set(matched.variant)}")
    series = []
    for knob, other in (KNOBS, KNOBS[::-1]):
        part = matched[(matched[other] == reference[other].iloc[0]) & (matched.lr == reference.lr.iloc[0])]
        part = part.assign(knob=knob, dose=part[knob]).drop(columns=list(KNOBS))
        series.append(part.sort_values("dose", kind="stable"))
    return pd.concat(series, ignore_index=True)


def dose_response(doses: pd.DataFrame) -> pd.DataFrame:
    """How outliers follow a dose: the rank correlation within each seed, its mean over seeds and the interval of that.

    Args:
        doses: rows of :func:`dose_table` of one moment.

    Returns:
        Columns knob, correlation (mean of Spearman's over seeds), low, high (95 %), seeds.

    Raises:
        ValueError: if a knob has one dose only.

    Example:
        >>> run = {"knob": "eps", "seed": 0}
        >>> rows = [run | {"dose": dose, "excess_kurtosis": kurtosis} for dose, kurtosis in ((1e-8, 9.0), (1e-2, 1.0))]
        >>> dose_response(pd.DataFrame(rows)).correlation.tolist()
        [-1.0]

    Paper: appendix C, reference [7].
    """
    rows = []
    for knob, part in doses.groupby("knob", sort=False):
        if part.dose.nunique() < 2:
            raise ValueError(f"{knob} has the dose {part.dose.iloc[0]} only: a response needs two")
        within = part.groupby("seed")[["dose", "excess_kurtosis"]].corr(method="spearman")
        found = paired_interval(within.xs("dose", level=1).excess_kurtosis.tolist())
        row = {"knob": knob, "correlation": found.mean, "low": found.low, "high": found.high}
        rows.append(row | {"seeds": found.n})
    return pd.DataFrame(rows)


# --- where the outliers sit -------------------------------------------------------------------------------------------


@torch.inference_mode()
def residual_streams(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The residual stream after the embedding and after each block.

    Args:
        model: a ViT of :class:`s2d.lab.models.DigitsViT`.
        images: ``(n, 1, side, side)``.

    Returns:
        ``"embedding"``, ``"blocks.0"``, ... to ``(n, tokens, width)``; the first token is the class token.

    Example:
        >>> from s2d.lab.models import DigitsViT
        >>> streams = residual_streams(DigitsViT(width=16, depth=1).build(0), torch.zeros(2, 1, 16, 16))
        >>> {name: tuple(stream.shape) for name, stream in streams.items()}
        {'embedding': (2, 17, 16), 'blocks.0': (2, 17, 16)}

    Paper: none.
    """
    kept: dict[str, Tensor] = {}

    def keep_input(_module: nn.Module, args: tuple) -> None:
        kept["embedding"] = args[0].clone()

    handles = [model.blocks[0].register_forward_pre_hook(keep_input)]
    for name, block in model.blocks.named_children():
        handles.append(
            block.register_forward_hook(lambda _m, _a, output, name=name: kept.update({f"blocks.{name}": output}))
        )
    _run_hooked(model, images, handles)
    return kept


def _run_hooked(model: nn.Module, images: Tensor, handles: Iterable[RemovableHandle]) -> None:
    """Call the model once, and remove the hooks whatever happens."""
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def largest_channel(stream: Tensor) -> int:
    """Index of the channel with the largest root mean square over images and tokens.

    Example:
        >>> largest_channel(torch.tensor([[[1.0, -3.0], [1.0, 2.0]]]))
        1
    """
    return int(stream.square().mean((0, 1)).argmax())


def largest_direction_share(stream: Tensor) -> float:
    """Share of the summed squares that lies along one direction, the best choice of all.

    A rotation of the channels leaves it as it is, where the share of the largest channel, and every kurtosis, depend on
    the basis: it tells an outlier that is gone from one that lies across the channels.

    Args:
        stream: ``(n, tokens, width)``.

    Returns:
        ``1 / width`` (no direction dominates) to 1 (all tokens on one line through zero).

    Example:
        >>> largest_direction_share(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]]))
        1.0

    Paper: none.
    """
    tokens = stream.flatten(0, 1).double()
    energies = torch.linalg.eigvalsh(tokens.T @ tokens)
    return (energies[-1] / energies.sum()).item()


@torch.inference_mode()
def outlier_location_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    r"""The largest channel of the residual stream after the embedding and after each block, and which tokens carry it.

    A LayerNorm without gains turns a channel that dwarfs all others into :math:`\sqrt{\text{width} - 1}`, its largest
    possible output.

    Args:
        checkpoints: variant to one checkpoint a seed.
        images: calibration images shown.

    Returns:
        Columns variant, seed, layer, channel (largest root mean square), energy_share (its share of the summed squares,
        0 to 1), direction_share (see :func:`largest_direction_share`), mean and std (of the channel, over images and
        tokens), class_mean_abs, patch_mean_abs (its mean magnitude on the class token and on the patches),
        normed_max_abs (its largest magnitude after the LayerNorm that reads the stream next), ceiling (of the last).

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> table = outlier_location_table({"AdamW": obtain([pretraining("adamw", seed=0)])}, images=8)
        >>> table.layer.tolist()
        ['embedding', 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3']

    Paper: appendix C.
    """
    rows = []
    for variant, trained in each(checkpoints):
        model = trained.model()
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        readers = [*(block.norm1 for block in model.blocks), model.norm]
        for (layer, stream), reader in zip(residual_streams(model, x).items(), readers, strict=True):
            channel = largest_channel(stream)
            value = stream[..., channel]
            rows.append(
                {
                    "variant": variant,
                    "seed": trained.seed,
                    "layer": layer,
                    "channel": channel,
                    "energy_share": (value.square().sum() / stream.square().sum()).item(),
                    "direction_share": largest_direction_share(stream),
                    "mean": value.mean().item(),
                    "std": value.std(correction=0).item(),
                    "class_mean_abs": value[:, 0].abs().mean().item(),
                    "patch_mean_abs": value[:, 1:].abs().mean().item(),
                    "normed_max_abs": reader(stream)[..., channel].abs().max().item(),
                    "ceiling": (stream.shape[-1] - 1) ** 0.5,
                }
            )
    return pd.DataFrame(rows)


@torch.inference_mode()
def outlier_writers_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    """What each layer adds to the channel that is the largest after the last block.

    The residual stream is a sum, so the means of one checkpoint add up to the channel's mean after the last block.

    Args:
        checkpoints: variant to one checkpoint a seed.
        images: calibration images shown.

    Returns:
        Columns variant, seed, channel, writer (pos_embed, patch_embed with the class token, attn.proj and mlp.fc2 of
        each block), mean and std of what it adds (over images and tokens), bias (the part of the mean that is the
        layer's bias; NaN for embeddings).

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> table = outlier_writers_table({"AdamW": obtain([pretraining("adamw", seed=0)])}, images=8)
        >>> table.writer.tolist()[:4]
        ['pos_embed', 'patch_embed', 'blocks.0.attn.proj', 'blocks.0.mlp.fc2']

    Paper: appendix C.
    """
    rows = []
    for variant, trained in each(checkpoints):
        model = trained.model()
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        streams = residual_streams(model, x)
        channel = largest_channel(list(streams.values())[-1])
        for writer, (added, bias) in _additions(model, x, streams["embedding"]).items():
            rows.append(
                {
                    "variant": variant,
                    "seed": trained.seed,
                    "channel": channel,
                    "writer": writer,
                    "mean": added[..., channel].mean().item(),
                    "std": added[..., channel].std(correction=0).item(),
                    "bias": float("nan") if bias is None else bias[channel].item(),
                }
            )
    return pd.DataFrame(rows)


def _additions(model: nn.Module, images: Tensor, embedding: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What each writer adds to the residual stream, and its bias."""
    position = model.pos_embed.expand_as(embedding)
    added = {"pos_embed": (position, None), "patch_embed": (embedding - position, None)}
    writers = {}
    for index, block in enumerate(model.blocks):
        writers |= {f"blocks.{index}.attn.proj": block.attn.proj, f"blocks.{index}.mlp.fc2": block.mlp.fc2}
    handles = [
        writer.register_forward_hook(lambda m, _a, output, name=name: added.update({name: (output, m.bias)}))
        for name, writer in writers.items()
    ]
    _run_hooked(model, images, handles)
    return added


# --- what grows with the outliers -------------------------------------------------------------------------------------


@torch.inference_mode()
def largest_input_norms(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Largest Euclidean norm of a token at the input of every watched layer.

    Example:
        >>> from s2d.lab.models import DigitsViT
        >>> list(largest_input_norms(DigitsViT(width=16, depth=2).build(0), torch.zeros(1, 1, 16, 16)))[:2]
        ['blocks.0.attn.qkv', 'blocks.0.attn.proj']
    """
    norms: dict[str, float] = {}
    layers = linear_maps(model)

    def keep(_module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        norms[name] = layers[name].input(args, kwargs).norm(dim=-1).max().item()

    handles = [
        linear.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: keep(module, args, kwargs, name), with_kwargs=True
        )
        for name, linear in layers.items()
    ]
    _run_hooked(model, images, handles)
    return {name: norms[name] for name in layers}


def growth_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    r"""Spectrum and outliers of every watched layer, for training runs of growing length.

    Args:
        checkpoints: runs that differ in seed and in number of steps, under any names.
        images: calibration images shown.

    Returns:
        Columns seed, steps, layer, sigma_1, pcdr_1 (activation form), max_abs (of the output without its bias),
        excess_kurtosis (of the output), input_norm (largest of a token), bound
        (:math:`\sigma_1 \max \|x\|`, what Theorem 1 allows).

    Raises:
        ValueError: without checkpoints.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> table = growth_table({"AdamW": obtain([pretraining("adamw", seed=0)])}, images=8)
        >>> bool((table.max_abs <= 1.0001 * table.bound).all())
        True

    Paper: Theorem 1, appendix C.
    """
    runs = [trained for _, trained in each(checkpoints)]
    if not runs:
        raise ValueError("no checkpoints: give runs of at least one length")
    tables = []
    for trained in runs:
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        norms = largest_input_norms(trained.model(), x)
        table = layer_statistics(trained, images=images, k_max=1)
        table = table.assign(seed=trained.seed, steps=trained.recipe.steps, input_norm=table.layer.map(norms))
        tables.append(table.assign(bound=table.sigma_1 * table.input_norm))
    columns = ["seed", "steps", "layer", "sigma_1", "pcdr_1", "max_abs", "excess_kurtosis", "input_norm", "bound"]
    return pd.concat(tables, ignore_index=True)[columns]


def growth_summary(
    checkpoints: Checkpoints, *, bits: Sequence[str] = ("W4A4", "W3A3"), images: int = TEST_IMAGES
) -> pd.DataFrame:
    """How severe the outliers of every run are, and what they cost: one row a run, however long it trained.

    Args:
        checkpoints: runs that differ in seed and in number of steps, under one name a length.
        bits: bit widths.
        images: test images.

    Returns:
        Columns steps, seed, excess_kurtosis (of the residual stream, at the end of training), ffn_sigma_1 (largest of
        the feed-forward weights), FP (accuracy), and the accuracies under round-to-nearest on both grids and ERQ, with
        names such as ``"RTN, symmetric W4A4"`` and ``"ERQ W3A3"``.

    Raises:
        ValueError: for an unknown bit width.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> runs = {"3000 steps": obtain([pretraining("adamw", seed=2)])}
        >>> growth_summary(runs, bits=["W4A4"], images=8).columns.tolist()[3:]
        ['ffn_sigma_1', 'FP', 'RTN, symmetric W4A4', 'RTN, asymmetric W4A4', 'ERQ W4A4']

    Paper: abstract (severity grows with pretraining), at laptop scale.
    """
    cost = frontier_table(checkpoints, bits=bits, methods=("ERQ",), erq_bits=(), images=images)
    cost["column"] = (cost.method + " " + cost.bits).where(cost.bits != "FP", "FP")
    accuracy = cost.pivot(index=["variant", "seed"], columns="column", values="accuracy")
    rows = []
    for variant, trained in each(checkpoints):
        ffn = (m.matrix() for name, m in linear_maps(trained.model()).items() if ".mlp." in name)
        row = {"steps": trained.recipe.steps, "seed": trained.seed}
        row |= {"excess_kurtosis": trained.history[-1]["excess_kurtosis"]}
        row |= {"ffn_sigma_1": max(torch.linalg.matrix_norm(weight.detach(), ord=2).item() for weight in ffn)}
        rows.append(row | accuracy.loc[(variant, trained.seed), list(dict.fromkeys(cost.column))].to_dict())
    return pd.DataFrame(rows)


@torch.inference_mode()
def width_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    r"""Kurtosis of the residual stream against what one channel can give a network of its width.

    Entries of which one in :math:`w` is :math:`\pm a` and the others 0 have an excess kurtosis of :math:`w - 3`: a
    channel that carries everything on every token. To have more, a few tokens must carry it.

    Args:
        checkpoints: runs of several widths.
        images: calibration images shown.

    Returns:
        Columns width, seed, validation_accuracy (at the end of training), excess_kurtosis (mean over the blocks, as in
        training histories), largest_block (largest over the blocks), ceiling (w - 3).

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> from s2d.lab.store import obtain
        >>> width_table({"AdamW": obtain([pretraining("adamw", seed=2)])}, images=8).ceiling.tolist()
        [61]

    Paper: appendix C, reference [2] ("> 100").
    """
    rows = []
    for _, trained in each(checkpoints):
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        streams = residual_streams(trained.model(), x)
        kurtosis = [excess_kurtosis(stream) for name, stream in streams.items() if name != "embedding"]
        row = {"width": trained.recipe.model.width, "seed": trained.seed}
        row |= {"validation_accuracy": trained.history[-1]["validation_accuracy"]}
        row |= {"excess_kurtosis": float(np.mean(kurtosis)), "largest_block": max(kurtosis)}
        rows.append(row | {"ceiling": trained.recipe.model.width - 3})
    return pd.DataFrame(rows)


# --- correlations -----------------------------------------------------------------------------------------------------


def _grid(table: pd.DataFrame, column: str, along: str) -> np.ndarray:
    """One column as an array ``(seeds, layers, lengths)``, or whatever the last axis is along."""
    axes = ["seed", "layer", along]
    index = pd.MultiIndex.from_product([table[axis].unique() for axis in axes])
    values = table.set_index(axes)[column]
    if not values.index.is_unique or len(values) != len(index) or values.isna().any():
        raise ValueError(f"{column} is not known once for every {', '.join(axes)}: measure all runs alike")
    if values.nunique() == 1:
        raise ValueError(f"{column} is {values.iloc[0]} everywhere: there is nothing to correlate")
    return values.reindex(index).to_numpy().reshape([table[axis].nunique() for axis in axes])


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; NaN where one side does not vary."""
    x, y = rankdata(x, axis=-1), rankdata(y, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


# How an array (..., seeds, layers, lengths) is cut into groups; the correlation is taken inside each and averaged.
SCOPES = {
    "all together": lambda a: a.reshape(*a.shape[:-3], 1, -1),
    "over layers, within a network": lambda a: np.moveaxis(a, -2, -1),
    "over training time, within a layer": lambda a: a,
}


LAYER_SCOPES = ("over layers, within a network", "all together")


def _mean_correlation(x: np.ndarray, y: np.ndarray, scope: str) -> np.ndarray:
    """Mean over the groups of a scope, for arrays ``(..., seeds, layers, lengths)``."""
    inside = _rank_correlation(SCOPES[scope](x), SCOPES[scope](y))
    inside = inside.reshape(*x.shape[:-3], -1)
    known = np.isfinite(inside)
    count = known.sum(-1)
    total = np.where(known, inside, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def correlation_table(growth: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of spectrum and outliers over layers, training time and seeds, with its confidence interval.

    The measurements are not independent: a layer is measured at several lengths, and a layer of one seed resembles the
    same layer of another. So the bootstrap draws whole seeds and, apart from them, whole layers with replacement (both
    factors at once, Owen 2007), and each drawn pair comes with all its lengths. A resample in which one side does not
    vary is left out. With three seeds the interval is rough.

    Args:
        growth: from :func:`growth_table`, every seed and layer measured at every length.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Columns x, y, scope (all together; over layers, within a network; over training time, within a layer),
        correlation (Spearman, averaged over the networks or layers of the scope; NaN when one side varies in none of
        them), low, high (95 % percentile interval), seeds, layers, lengths (how many).

    Raises:
        ValueError: for an incomplete table, fewer than two layers or lengths, or a column that does not vary.

    Example:
        >>> rows = [
        ...     {"seed": 0, "layer": layer, "steps": steps, "sigma_1": steps + i} | dict.fromkeys(
        ...         ("pcdr_1", "max_abs", "excess_kurtosis", "bound"), steps + i
        ...     )
        ...     for i, layer in enumerate("abc")
        ...     for steps in (100, 200)
        ... ]
        >>> set(correlation_table(pd.DataFrame(rows), resamples=20).correlation)
        {1.0}

    Paper: Theorem 1.
    """
    if growth.layer.nunique() < 2 or growth.steps.nunique() < 2:
        raise ValueError(
            f"{growth.layer.nunique()} layers and {growth.steps.nunique()} lengths: a correlation over them needs two"
        )
    rows = _correlated(growth, PAIRS, "steps", SCOPES, resamples=resamples, seed=seed)
    counts = {name: growth[column].nunique() for name, column in _COUNTED.items()}
    return pd.DataFrame(rows).assign(**counts, lengths=growth.steps.nunique())


_COUNTED = {"seeds": "seed", "layers": "layer"}


def _correlated(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    along: str,
    scopes: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> list[dict]:
    """Correlation and interval of each pair in each scope, by the bootstrap of :func:`correlation_table`."""
    grids = {column: _grid(table, column, along) for column in dict.fromkeys(c for pair in pairs for c in pair)}
    seeds, layers, _ = next(iter(grids.values())).shape
    generator = np.random.default_rng(seed)
    drawn_seeds = generator.integers(seeds, size=(resamples, seeds, 1))
    drawn_layers = generator.integers(layers, size=(resamples, 1, layers))
    rows = []
    for x, y in pairs:
        for scope in scopes:
            resampled = (grids[name][drawn_seeds, drawn_layers] for name in (x, y))
            found = _mean_correlation(*resampled, scope)
            found = found[np.isfinite(found)]
            low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (np.nan, np.nan)
            value = _mean_correlation(grids[x], grids[y], scope)
            rows.append({"x": x, "y": y, "scope": scope, "correlation": float(value), "low": low, "high": high})
    return rows


def layer_correlation_table(layers: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of a layer's spectrum and its largest activation, within networks and pooled over optimizers.

    Pooled, networks of two optimizers correlate whatever the optimizer changes, be there a link within a network or
    not. So the pooled number says nothing alone; the one within networks does.

    Args:
        layers: from :func:`s2d.lab.evaluate.layer_table`, every variant on the same seeds.
        resamples, seed: of the bootstrap over seeds and layers, see :func:`correlation_table`.

    Returns:
        Columns variant (one, or all joined by "and"), x, y, scope ("over layers, within a network" or "all together"),
        correlation (Spearman), low, high (95 %), seeds, layers.

    Raises:
        ValueError: for an incomplete table, fewer than two layers, or a column that does not vary.

    Example:
        >>> rows = [
        ...     {"variant": v, "seed": 0, "layer": layer, "max_abs": i}
        ...     | dict.fromkeys(("sigma_1", "pcdr_1", "spectral_pcdr_1"), i)
        ...     for v in ("AdamW", "SGD")
        ...     for i, layer in enumerate("abc")
        ... ]
        >>> layer_correlation_table(pd.DataFrame(rows), resamples=20).variant.unique().tolist()
        ['AdamW and SGD', 'AdamW', 'SGD']

    Paper: Theorem 1.
    """
    if layers.layer.nunique() < 2:
        raise ValueError(f"{layers.layer.nunique()} layers: a correlation over them needs two")
    parts = {name: part for name, part in layers.groupby("variant", sort=False)}
    parts = {" and ".join(parts): layers} | parts
    tables = [
        pd.DataFrame(_correlated(part, LAYER_PAIRS, "variant", LAYER_SCOPES, resamples=resamples, seed=seed)).assign(
            **{count: part[column].nunique() for count, column in _COUNTED.items()}, variant=name
        )
        for name, part in parts.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["variant", *table.columns.drop("variant")]]
