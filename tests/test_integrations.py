"""The integrations, with the real libraries on tiny models.

Oracle throughout: the same training written out as a plain PyTorch loop around :class:`s2d.SelectiveSpectralDecay`,
in float64, with accumulation and with a clipping threshold so low that it always acts. Resuming is held to the run
that never stopped, bit for bit.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from networks import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from s2d import SelectiveSpectralDecay, SpectralNormCap

ROOT = Path(__file__).resolve().parents[1]
# The libraries warn of their own deprecations, and Lightning of each small thing a tiny run does without.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SETTINGS = {"lam": 0.05, "tau": 0.5, "k_max": 2, "refresh_every": 4}
CLIP, ACCUMULATE, BATCH, RATE = 0.05, 2, 4, 0.01


class Network(nn.Module):
    """Two residual blocks and a head; speaks the Trainer's language too (keyword arguments, a loss inside)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 3)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        y = self.head(self.drop(self.blocks(x)))
        return y if labels is None else {"loss": cross_entropy(y, labels), "logits": y}


def data(n: int = 48, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    x[:, 1] *= 10  # an outlier channel for PCDR to find
    return TensorDataset(x.to(dtype), torch.randint(3, (n,), generator=generator))


def rows(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in data(dtype=dtype)]


def by_hand(
    model: nn.Module,
    *,
    decay: bool = True,
    autocast=nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    **settings,
) -> nn.Module:
    """One epoch of accumulation, clipping and S2D in a plain loop; returns the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    if decay:
        SelectiveSpectralDecay(model, **(SETTINGS | settings)).attach(optimizer)
    dtype = next(model.parameters()).dtype
    for step, (x, y) in enumerate(DataLoader(data(dtype=dtype), batch_size=BATCH)):
        with autocast():
            loss = cross_entropy(model(x), y) / ACCUMULATE
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (step + 1) % ACCUMULATE == 0:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return model


def assert_same(first: nn.Module, second: nn.Module, *, tolerance: float = 0.0) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 1
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_oracle_can_tell():
    plain = by_hand(Network().double(), decay=False)
    decayed = by_hand(Network().double())
    assert distance(plain, decayed) > 1e-3
    assert distance(decayed, by_hand(Network().double(), refresh_every=3)) > 1e-6


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its choice of device and precision in process-wide singletons."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def hf_trainer(folder: Path, model: nn.Module, callbacks: list, **arguments):
    transformers = pytest.importorskip("transformers")
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "max_grad_norm": CLIP,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 2,
    } | arguments
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=callbacks,
    )


def hf_callback(**settings):
    pytest.importorskip("transformers")
    from s2d.integrations.transformers import S2DCallback

    return S2DCallback(**(SETTINGS | settings))


@pytest.mark.parametrize(
    "settings",
    [{}, {"coefficients": "live", "coupling": "decoupled"}, {"criterion": "spectral", "include": "blocks.*.fc2"}],
    ids=["paper", "live-decoupled", "spectral"],
)
def test_transformers_equals_the_plain_loop(tmp_path, settings):
    callback = hf_callback(**settings)
    model = Network().double()
    hf_trainer(tmp_path, model, [callback]).train()
    assert_same(model, by_hand(Network().double(), **settings), tolerance=1e-12)
    assert callback.decay.steps == 6
    assert len(callback.decay.report()) == len(callback.decay.layers) > 1
    assert hooks(model) == 0


def test_transformers_under_autocast_equals_the_plain_loop(tmp_path):
    model = Network()
    trainer = hf_trainer(tmp_path, model, [hf_callback()], bf16=True)
    trainer.train_dataset = rows(torch.float32)
    trainer.train()
    by = by_hand(Network(), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same(model, by, tolerance=1e-6)


def test_transformers_without_strength_equals_training_without_the_callback(tmp_path):
    with_callback, without = Network().double(), Network().double()
    hf_trainer(tmp_path, with_callback, [hf_callback(lam=0.0)]).train()
    hf_trainer(tmp_path, without, []).train()
    assert_same(with_callback, without)


def resuming_pair(tmp_path: Path, **arguments):
    """The trained model and callback of a run in one go, and the folder of the same run's checkpoint after 3 steps.

    With dropout, the default shuffling and a refresh at steps 0, 4, ... so that a forgotten state shows.
    """
    arguments = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"} | arguments
    model, callback = dropping(Network().double()), hf_callback()
    hf_trainer(tmp_path / "whole", model, [callback], **arguments).train()
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    return model, callback, arguments


def dropping(model: Network) -> Network:
    model.drop.p = 0.2
    return model


def test_transformers_resuming_equals_never_having_stopped(tmp_path):
    model, callback, arguments = resuming_pair(tmp_path)
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert "s2d.safetensors" in files and not any(name.endswith(".partial") for name in files)

    resumed, second = dropping(Network(seed=9).double()), hf_callback()
    hf_trainer(tmp_path / "part", resumed, [second], **arguments).train(resume_from_checkpoint=True)
    assert_same(model, resumed)
    assert_same_state(callback.decay.state_dict(), second.decay.state_dict())


def test_transformers_resuming_from_another_folder(tmp_path):
    model, callback, arguments = resuming_pair(tmp_path)
    shutil.move(tmp_path / "part", tmp_path / "moved")
    checkpoint = str(tmp_path / "moved" / "checkpoint-3")

    resumed = dropping(Network(seed=9).double())
    trainer = hf_trainer(tmp_path / "new", resumed, [hf_callback()], **arguments)
    trainer.train(resume_from_checkpoint=checkpoint)  # found where the run wrote it
    assert_same(model, resumed)

    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"name its folder in TrainingArguments\(resume_from_checkpoint"):
        hf_trainer(tmp_path / "newer", Network().double(), [hf_callback()], **arguments).train(
            resume_from_checkpoint=checkpoint
        )
    resumed = dropping(Network(seed=9).double())
    arguments["resume_from_checkpoint"] = checkpoint
    hf_trainer(tmp_path / "newer", resumed, [hf_callback()], **arguments).train(resume_from_checkpoint=checkpoint)
    assert_same(model, resumed)


def test_transformers_does_not_take_the_state_of_another_run(tmp_path):
    _, _, arguments = resuming_pair(tmp_path)
    hf_trainer(tmp_path / "other", Network(seed=1).double(), [hf_callback()], **arguments).train()
    name = Path("checkpoint-3", "s2d.safetensors")
    shutil.copy(tmp_path / "other" / name, tmp_path / "part" / name)
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(ValueError, match="resume from an earlier checkpoint"):
        trainer = hf_trainer(tmp_path / "part", Network().double(), [hf_callback()], **arguments)
        trainer.train(resume_from_checkpoint=True)


def test_transformers_starts_afresh_on_a_checkpoint_made_without_s2d(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3}
    hf_trainer(tmp_path, Network().double(), [], **arguments).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    callback = hf_callback()
    hf_trainer(tmp_path, Network().double(), [callback], **arguments).train(resume_from_checkpoint=True)
    assert callback.decay.steps == 3


def test_transformers_logs_the_metrics_once_with_each_training_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    seen = []

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = hf_callback()
    trainer = hf_trainer(tmp_path, Network().double(), [callback, Recorder()], eval_strategy="epoch")
    trainer.train()
    names = callback.decay.metrics().keys()
    assert len(names) > 0
    history = trainer.state.log_history
    assert sum("loss" in row for row in history) == 3 and sum("eval_loss" in row for row in history) == 1
    for row, logs in zip(history, seen, strict=True):
        assert all((name in row) == ("loss" in row) for name in names)
        assert logs == {key: value for key, value in row.items() if key != "step"}


def test_transformers_a_training_that_broke_off_leaves_no_second_decay(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Breaker(transformers.TrainerCallback):
        broken = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    model = Network().double()
    trainer = hf_trainer(tmp_path, model, [hf_callback(), Breaker()])
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model.load_state_dict(start)
    trainer.optimizer = None
    trainer.train()
    assert_same(model, by_hand(Network().double()), tolerance=1e-12)
    assert hooks(model) == 0


def test_transformers_real_model_and_peft(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    callback = hf_callback()
    trainer = hf_trainer(tmp_path, model, [callback])
    trainer.train_dataset = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    trainer.train()
    assert len(callback.decay.report()) == 12  # query, key, value, output, and the two of the MLP, in two blocks

    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1", "dense", "query"], r=2))
    with pytest.raises(ValueError, match="PEFT adapter"):
        hf_trainer(tmp_path, adapted, [hf_callback()]).train()


# --- accelerate -------------------------------------------------------------------------------------------------------


def accelerated(model: nn.Module, *, folder: Path | None = None, stop: int | None = None, resume: Path | None = None):
    """The loop of the accelerate example in miniature: returns the decay; saves after ``stop`` optimizer steps."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    loader = DataLoader(data(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    decay = SelectiveSpectralDecay(model, **SETTINGS)
    decay.attach(optimizer)
    accelerator.register_for_checkpointing(decay)
    if resume is not None:
        accelerator.load_state(resume)
        loader = accelerator.skip_first_batches(loader, decay.steps * ACCUMULATE)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and decay.steps == stop:
            accelerator.save_state(folder)
    return decay


def test_accelerate_equals_the_plain_loop():
    model = Network().double()
    decay = accelerated(model)
    assert_same(model, by_hand(Network().double()), tolerance=1e-12)
    assert decay.steps == 6


def test_accelerate_with_the_cap():
    accelerate = pytest.importorskip("accelerate")
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(network, optimizer)
    cap = SpectralNormCap(model, cap=0.1, every=2)
    cap.attach(optimizer)
    for _ in range(2):
        optimizer.step()
    assert cap.steps == 2
    for linear in cap.layers.values():
        assert torch.linalg.matrix_norm(linear.matrix().detach(), 2) < 0.1001


def test_accelerate_resuming_equals_never_having_stopped(tmp_path):
    model, resumed = Network().double(), Network(seed=9).double()
    whole = accelerated(model, folder=tmp_path / "state", stop=3)
    part = accelerated(resumed, resume=tmp_path / "state")
    assert_same(model, resumed)
    assert_same_state(whole.state_dict(), part.state_dict())


# --- lightning --------------------------------------------------------------------------------------------------------


def pl_module(network: nn.Module, *, manual: bool = False):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            if manual:
                optimizer = self.optimizers()
                self.manual_backward(loss / ACCUMULATE)
                if (batch_idx + 1) % ACCUMULATE == 0:
                    self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("validation", cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)

    return Module()


def pl_callback(**settings):
    pytest.importorskip("lightning.pytorch")
    from s2d.integrations.lightning import S2DCallback

    return S2DCallback(**(SETTINGS | settings))


def pl_trainer(folder: Path, callbacks: list, *, manual: bool = False, **arguments):
    pl = pytest.importorskip("lightning.pytorch")
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "default_root_dir": folder,
    } | arguments
    if not manual:
        arguments |= {"gradient_clip_val": CLIP, "accumulate_grad_batches": ACCUMULATE}
    return pl.Trainer(callbacks=callbacks, **arguments)


def loader(dtype: torch.dtype = torch.float64) -> DataLoader:
    return DataLoader(data(dtype=dtype), batch_size=BATCH)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "settings", [{}, {"coefficients": "live", "coupling": "decoupled"}], ids=["paper", "decoupled"]
)
def test_lightning_equals_the_plain_loop(tmp_path, settings, manual):
    network, callback = Network().double(), pl_callback(**settings)
    trainer = pl_trainer(tmp_path, [callback], manual=manual)
    trainer.fit(pl_module(network, manual=manual), loader(), loader())
    assert_same(network, by_hand(Network().double(), **settings), tolerance=1e-12)
    assert callback.decay.steps == 6 and hooks(network) == 0
    assert callback.decay.report()[0]["layer"] == "net.blocks.0.fc1"


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_in_mixed_precision_equals_the_plain_loop(tmp_path, precision):
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) if precision == "16-mixed" else None for _ in range(2)]
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    network = Network()
    # Trainer(precision="16-mixed") would fall back to bfloat16 on a CPU; the plugin itself does not.
    plugin = plugins.MixedPrecision(precision, "cpu", scalers[0])
    pl_trainer(tmp_path, [pl_callback()], plugins=[plugin]).fit(pl_module(network), loader(torch.float32))
    expected = by_hand(Network(), autocast=lambda: torch.autocast("cpu", dtype), scaler=scalers[1])
    assert_same(network, expected, tolerance=1e-6)


def test_lightning_without_strength_equals_training_without_the_callback(tmp_path):
    networks = Network().double(), Network().double()
    for network, callbacks in zip(networks, ([pl_callback(lam=0.0)], []), strict=True):
        pl_trainer(tmp_path, callbacks).fit(pl_module(network), loader())
    assert_same(*networks)


def test_lightning_resuming_equals_never_having_stopped(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    network, callback = Network().double(), pl_callback()
    trainer = pl_trainer(tmp_path, [callback, saver], enable_checkpointing=True, max_epochs=2)
    trainer.fit(pl_module(network), loader())
    checkpoint = str(tmp_path / "step=6.ckpt")  # between two refreshes, at steps 4 and 8

    resumed, second = Network(seed=9).double(), pl_callback()
    trainer = pl_trainer(tmp_path, [second], max_epochs=2)
    trainer.fit(pl_module(resumed), loader(), ckpt_path=checkpoint)
    assert_same(network, resumed)
    assert_same_state(callback.decay.state_dict(), second.decay.state_dict())

    # A checkpoint that was only looked at must not leak into a training that starts afresh.
    third, module = pl_callback(), pl_module(Network().double())
    trainer = pl_trainer(tmp_path, [third])
    trainer.validate(module, loader(), ckpt_path=checkpoint, verbose=False)
    trainer.fit(module, loader())
    assert third.decay.steps == 6


def test_lightning_logs_the_metrics(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = pl_callback()
    pl_trainer(tmp_path, [callback], logger=logger).fit(pl_module(Network().double()), loader())
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert set(callback.decay.metrics()) <= set(header.split(","))
    assert len(lines) == 3


def test_lightning_detaches_from_a_training_that_broke_off(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")

    class Breaker(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise RuntimeError("broke off")

    network = Network().double()
    with pytest.raises(RuntimeError, match="broke off"):
        pl_trainer(tmp_path, [pl_callback(), Breaker()]).fit(pl_module(network), loader())
    assert hooks(network) == 0


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_recipe() -> str:
    """The lines to paste, as printed in the recipe."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "examples" / "timm_train.md").read_text(), re.DOTALL)
    return block


def timm_training(
    folder: Path, epochs: int, *, opt: str = "adamw", recipe: bool = True, scaler: bool = False, resume: bool = False
):
    """timm's train script in miniature, with its own optimizer factory, scaler, EMA, checkpoints and clipping."""
    timm = pytest.importorskip("timm")
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad

    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=3)
    with torch.no_grad():
        for block in model.blocks:  # a dominant component, which the defaults select
            block.mlp.fc2.weight += 20 * torch.outer(torch.ones(12) / 12**0.5, torch.ones(48) / 48**0.5)
    optimizer = create_optimizer_v2(model, opt=opt, lr=RATE, weight_decay=0.05, layer_decay=0.9)
    names = {"model": model, "optimizer": optimizer._base_optimizer if opt.startswith("lookahead") else optimizer}
    if recipe:
        exec(compile(timm_recipe(), "timm_train.md", "exec"), names)
    loss_scaler = NativeScaler(device="cpu") if scaler else None
    start = resume_checkpoint(model, str(folder / "last.pth.tar"), optimizer, loss_scaler, False) if resume else 0
    ema = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, amp_scaler=loss_scaler, checkpoint_dir=folder, recovery_dir=folder)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3
    for epoch in range(start, epochs):
        model.train()
        for x, y in zip(images.split(4), labels.split(4), strict=True):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            if loss_scaler is not None:
                loss_scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), CLIP)
                optimizer.step()
            ema.update(model)
        with torch.no_grad():
            ema.module.eval()(images)
        saver.save_checkpoint(epoch, metric=float(epoch))
    return model, names.get("decay")


def test_timm_recipe_is_applied_after_clipping(tmp_path):
    without, _ = timm_training(tmp_path, 1, recipe=False)
    trained, decay = timm_training(tmp_path, 1)
    assert decay.steps == 2 and len(decay.report()) == 8  # qkv, proj and the two of the MLP, in two blocks
    assert distance(without, trained) > 1e-4
    scaled, _ = timm_training(tmp_path, 1, scaler=True)
    assert_same(trained, scaled, tolerance=1e-5)
    _, decay = timm_training(tmp_path, 1, opt="lookahead_adamw")
    assert decay.steps == 2


def test_timm_recipe_resumes_from_timms_own_checkpoint(tmp_path):
    whole, decay = timm_training(tmp_path / "a", 3)
    timm_training(tmp_path / "b", 2)
    resumed, second = timm_training(tmp_path / "b", 3, resume=True)
    assert_same(whole, resumed)
    assert_same_state(decay.state_dict(), second.state_dict())


# --- examples ---------------------------------------------------------------------------------------------------------


def run_example(name: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a script as a user would, in a folder of its own; returns its last line without the seconds in it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "S2D step" in done.stdout
    return done.stdout.strip().splitlines()[-1].partition(", refresh")[0]


def test_example_plain_loop(tmp_path):
    last = run_example("plain_loop.py", tmp_path)
    assert 4 < float(re.search(r"largest singular value ([\d.]+)", last)[1]) < 5


def test_example_transformers_trainer(tmp_path):
    pytest.importorskip("transformers")
    first = run_example("transformers_trainer.py", tmp_path)
    output = tmp_path / "build" / "examples" / "transformers"
    shutil.rmtree(output / "checkpoint-30")
    assert run_example("transformers_trainer.py", tmp_path, "--resume") == first


def test_example_accelerate_finetune(tmp_path):
    pytest.importorskip("accelerate")
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    first = run_example("accelerate_finetune.py", tmp_path, launcher=launcher)
    resume = str(tmp_path / "build" / "examples" / "accelerate" / "epoch-2")
    assert run_example("accelerate_finetune.py", tmp_path, "--resume", resume) == first


def test_example_lightning_finetune(tmp_path):
    pytest.importorskip("lightning")
    first = run_example("lightning_finetune.py", tmp_path)
    resume = str(tmp_path / "build" / "examples" / "lightning" / "epoch=1.ckpt")
    assert run_example("lightning_finetune.py", tmp_path, "--resume", resume) == first
