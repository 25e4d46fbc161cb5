"""Selective Spectral Decay in the Lightning Trainer: one callback.

    python examples/lightning_finetune.py
    python examples/lightning_finetune.py --resume build/examples/lightning/epoch=1.ckpt

A small transformer with random weights on random sequences, so nothing is downloaded. Expect a checkpoint after each
epoch, S2D's metrics beside the loss in ``metrics.csv`` and a closing summary; takes about 10 s on a CPU. A resumed run
ends with the same summary, but for the seconds in it.
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from s2d.integrations.lightning import S2DCallback


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(32, 4)
        with torch.no_grad():  # one component far above the rest, as pretraining with AdamW leaves them behind
            self.net.layers[0].linear1.weight += 0.2 * torch.outer(torch.randn(64), torch.randn(32))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        loss = nn.functional.cross_entropy(self.head(self.net(x).mean(1)), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--output", default="build/examples/lightning", help="folder for checkpoints")
parser.add_argument("--resume", help="a checkpoint to continue from")
options = parser.parse_args()

pl.seed_everything(0)
loader = DataLoader(TensorDataset(torch.randn(256, 8, 32), torch.arange(256) % 4), batch_size=16)
callback = S2DCallback(lam=1e-2, refresh_every=5, include="net.layers.*.linear*")
saver = pl.callbacks.ModelCheckpoint(options.output, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
trainer = pl.Trainer(
    max_epochs=4,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[callback, saver],
    logger=pl.loggers.CSVLogger(options.output),
    log_every_n_steps=5,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), loader, ckpt_path=options.resume)
print(f"loss {trainer.callback_metrics['loss']:.4f}  {callback.decay.summary()}")
