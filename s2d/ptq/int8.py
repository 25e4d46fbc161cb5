"""Real int8 on a CPU: a quantized model as an ONNX graph whose Linear layers ONNX Runtime computes in integers.

Each Linear layer becomes two nodes: ``QuantizeLinear`` (input to uint8 codes, with the grid that was calibrated) and
``com.microsoft.MatMulIntegerToFloat`` (uint8 times int8 summed in int32, then times input scale and weight scale, plus
the bias). The kernels are named in the file, so nothing depends on what a graph optimizer recognises. All the rest
(attention products, softmax, LayerNorm, GELU, convolutions) is computed in float32; quantizers of attention products
are left out, so what to compare with is the simulation without them (:func:`without_product_quantizers`).

Needs the packages of ``pip install 's2d[int8]'``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.files import write_atomically
from s2d.ptq.checkpoint import check_quantized
from s2d.ptq.quantizers import AffineQuantizer, Quantizer
from s2d.ptq.sites import QuantizedLinear, products, quantized_layers

OPSET = 20  # the first with a Gelu operator
KERNEL = "MatMulIntegerToFloat"


def without_product_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose attention products are in floating point, as :func:`export_int8` has them.

    Example:
        >>> from s2d.ptq import coverage, quantize
        >>> model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
        >>> exact = without_product_quantizers(quantize(model, w_bits=8, a_bits=8, calibration=x))
        >>> {row["kind"]: row["input"] for row in coverage(exact)}["qk"]
        'float'

    Paper: none.
    """
    model = copy.deepcopy(model)
    for product in products(model).values():
        product.left_quantizer = product.right_quantizer = None
        product.left_transform = product.right_transform = None  # they cancel
    return model


class _Int8Linear(nn.Module):
    """The two nodes of one layer; it exists to be exported and computes nothing outside of that."""

    def __init__(self, site: QuantizedLinear) -> None:
        super().__init__()
        _check(site)
        weight, inputs = site.weight_quantizer, site.input_quantizer
        # Only uint8 inputs with int8 weights have fast kernels on x86 (int8 inputs took 24 times as long), so codes and
        # zero points move together: the values stay.
        shift = 128 if inputs.symmetric else 0
        down = 128 if weight.q_max > 127 else 0
        rows = (len(site.weight),)
        low, high = inputs.q_min + shift, inputs.q_max + shift
        self.clips = (low, high) != (0, 255)
        # Contiguous clones: the exporter gives buffers that share memory one name.
        self.register_buffer(
            "codes", (site.weight_codes() - down).to(torch.int8).t().clone(memory_format=torch.contiguous_format)
        )
        self.register_buffer("weight_scale", weight.scale.float().reshape(-1).expand(rows).clone())
        zero = (weight.zero_point - down).to(torch.int8).reshape(-1).expand(rows).clone()
        self.register_buffer("weight_zero_point", None if (zero == 0).all() else zero)
        self.register_buffer("input_scale", inputs.scale.float().reshape(()).clone())
        self.register_buffer("input_zero_point", (inputs.zero_point + shift).to(torch.uint8).reshape(()).clone())
        self.register_buffer("low", torch.tensor(low, dtype=torch.uint8))
        self.register_buffer("high", torch.tensor(high, dtype=torch.uint8))
        self.register_buffer("bias", None if site.bias is None else site.bias.detach().float().clone())
        # Some attentions use a layer by its weight, others ask for the weight's dtype. Not registered: not exported.
        self.__dict__["weight"] = site.weight.detach().float()

    def forward(self, x: Tensor, extra_bias: Tensor | None = None) -> Tensor:
        node = torch.onnx.ops.symbolic
        codes = node(
            "QuantizeLinear",
            (x, self.input_scale, self.input_zero_point),
            dtype=torch.uint8,
            shape=x.shape,
            version=OPSET,
        )
        if self.clips:
            codes = node("Clip", (codes, self.low, self.high), dtype=torch.uint8, shape=x.shape, version=OPSET)
        scales = (self.input_scale, self.weight_scale)
        operands = (codes, self.codes, *scales, self.input_zero_point, self.weight_zero_point, self.bias)
        shape = (*x.shape[:-1], self.codes.shape[1])
        output = node(f"com.microsoft::{KERNEL}", operands, dtype=torch.float32, shape=shape, version=1)
        return output if extra_bias is None else output + extra_bias


def _check(site: QuantizedLinear) -> None:
    """Raise ValueError, naming layer and reason, for what the integer kernels cannot compute."""
    name = f"layer {site.name or '(the model)'}"
    if site.input_transform is not None:
        raise ValueError(
            f"{name} has an input transform ({type(site.input_transform).__name__}): quantize without transforms= that "
            "act at run time"
        )
    kinds = {"weight": ("per_tensor", "per_channel"), "input": ("per_tensor",)}
    for side, quantizer in (("weight", site.weight_quantizer), ("input", site.input_quantizer)):
        if quantizer is None:
            raise ValueError(f"{name}: its {side} is in floating point: quantize with w_bits and a_bits of at most 8")
        if type(quantizer) is not AffineQuantizer or quantizer.granularity not in kinds[side]:
            raise ValueError(
                f"{name}: its {side} has {_kind(quantizer)}, integer kernels take AffineQuantizer "
                f"({' or '.join(kinds[side])}): use rtn, smoothquant, repq_vit, or erq with column_groups=False"
            )
    if site.weight_quantizer.scale.numel() > 1 and site.weight_quantizer.scale.shape != (len(site.weight), 1):
        raise ValueError(
            f"{name}: its weight has grids per input channel: choose a method with one grid an output channel"
        )


def _kind(quantizer: Quantizer) -> str:
    granularity = getattr(quantizer, "granularity", None)
    return type(quantizer).__name__ + (f" ({granularity})" if granularity else "")


@torch.no_grad()
def export_int8(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write a quantized model as an ONNX file for :class:`Int8Session`.

    Args:
        model: from :func:`s2d.ptq.quantize` with at most 8 bits on both sides, or a module around one, whose input and
            output are one tensor each; left untouched. Linear layers that were excluded stay in float32.
        example: a batch; the file takes batches of any size, items of this shape only.
        path: the file, weights included (2 GB at most).

    Raises:
        ImportError: without the packages onnx and onnxscript.
        ValueError: for a model that is not quantized, a layer that the integer kernels cannot compute (named, with the
            reason) or that the model does not call.

    Example:
        >>> import tempfile
        >>> from s2d.ptq import quantize
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> quantized = quantize(model, w_bits=8, a_bits=8, calibration=torch.randn(32, 4))
        >>> x = torch.randn(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_int8(quantized, x, f"{folder}/model.onnx")
        ...     logits = Int8Session(f"{folder}/model.onnx")(x)
        >>> torch.allclose(logits, quantized(x), atol=0.05)
        True

    Paper: appendix D (S2D leaves standard weights for vanilla kernels).
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_int8 needs onnx and onnxscript: pip install 's2d[int8]'") from error
    check_quantized(model)
    if example.ndim == 0 or len(example) == 0:
        raise ValueError(f"example has shape {tuple(example.shape)}: give a batch of at least one item")
    exported = without_product_quantizers(model).cpu().float().eval()
    replaced: dict[nn.Module, nn.Module] = {}
    for site in quantized_layers(exported).values():
        if isinstance(site, QuantizedLinear):
            replaced[site] = _Int8Linear(site)
        elif site.input_quantizer is not None:
            raise ValueError(
                f"layer {site.name} is a convolution with a quantized input: leave its input in floating point"
            )
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no quantized Linear layer: there is nothing to compute in int8")
    for parent in list(exported.modules()):
        for child, module in parent._modules.items():
            if module in replaced:
                setattr(parent, child, replaced[module])
    exported = replaced.get(exported, exported).eval()
    if not example.is_floating_point():
        raise ValueError(f"example holds {example.dtype}: only models of images (floating point) can be exported")
    batch = example.detach().cpu().float()
    batch = batch if len(batch) > 1 else torch.cat([batch, batch])  # the exporter takes a batch of one for a constant
    _check_calls(exported, batch, replaced)
    with _silent():
        program = torch.onnx.export(
            exported,
            (batch,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's paths
    write_atomically(path, lambda temporary: program.save(str(temporary), external_data=False))


def _check_calls(exported: nn.Module, batch: Tensor, replaced: dict[nn.Module, nn.Module]) -> None:
    """ValueError unless the model calls all integer layers and puts out one tensor."""
    called: set[nn.Module] = set()
    hooks = [new.register_forward_pre_hook(lambda module, _: called.add(module)) for new in replaced.values()]
    output = exported(batch)
    for hook in hooks:
        hook.remove()
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model puts out a {type(output).__name__}: wrap the quantized model in a module that gives one tensor"
        )
    for site, new in replaced.items():
        if new not in called:
            raise ValueError(f"layer {site.name} is never called: exclude it when quantizing")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of operators it does not find or does not fold."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- running ---------------------------------------------------------------------------------------------------------


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ImportError("Int8Session needs onnx and onnxruntime: pip install 's2d[int8]'") from error
    return onnxruntime


@cache
def saturates() -> bool:
    """Whether this processor's uint8 x int8 kernels overflow: x86 without VNNI adds two products in int16."""
    onnxruntime = _onnxruntime()
    from onnx import TensorProto, helper, numpy_helper

    rows, inner, columns = 8, 64, 16
    weight = numpy_helper.from_array(torch.full((inner, columns), 127, dtype=torch.int8).numpy(), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])],
        "saturates",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [rows, columns])],
        [weight],
    )
    # The IR version of the exporter, as ONNX's newest may be ahead of the runtime.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sums = session.run(None, {"codes": torch.full((rows, inner), 255, dtype=torch.uint8).numpy()})[0]
    return bool((sums != 255 * 127 * inner).any())


def _with_uint8_weights(path: str | Path) -> bytes:
    """The model of a file with int8 weights and zero points moved up by 128 to uint8: the same values.

    ONNX Runtime's option session.x64quantprecision does this too, but also on processors with VNNI, where it costs
    speed, and it fails on a model in which two layers share a weight or a zero point.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    default = "weight_zero_point_128"
    model.graph.initializer.append(numpy_helper.from_array(torch.tensor(128, dtype=torch.uint8).numpy(), default))
    moved = set()
    for node in model.graph.node:
        if node.op_type != KERNEL:
            continue
        node.input.extend([""] * (6 - len(node.input)))  # trailing inputs left out of the file
        node.input[5] = node.input[5] or default
        for name in {node.input[1], node.input[5]} - moved - {default}:
            codes = numpy_helper.to_array(initializers[name])
            initializers[name].CopyFrom(numpy_helper.from_array(codes.view("uint8") ^ 128, name))
            moved.add(name)
    return model.SerializeToString()


class Int8Session:
    """Runs a file of :func:`export_int8` on the CPU: ``session(images)`` gives the logits.

    Args:
        path: the file.
        threads: of ONNX Runtime; None for one per core.
        uint8_weights: hold the weights as uint8, which is exact on every processor and slower; None does it where
            :func:`saturates` says that it is needed.

    Raises:
        ImportError: without the packages onnxruntime and onnx.
        ValueError: for a missing file, a number of threads below 1; when called, for images of another shape or not
            finite.

    Example: see :func:`export_int8`.

    Paper: none.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, uint8_weights: bool | None = None) -> None:
        onnxruntime = _onnxruntime()
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist: write it with export_int8 first")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}: give at least 1")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # A thread pool that spins takes time from whatever else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = _with_uint8_weights(path) if (saturates() if uint8_weights is None else uint8_weights) else str(path)
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]

    def __call__(self, images: Tensor) -> Tensor:
        """The logits, float32 on the CPU."""
        expected = self.input.shape[1:]
        if list(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: the file was exported for (batch, "
                f"{', '.join(map(str, expected))})"
            )
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or infinity, which have no integer code: check the images")
        array = images.detach().cpu().float().contiguous().numpy()
        return torch.from_numpy(self.session.run(None, {self.input.name: array})[0])
