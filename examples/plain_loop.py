"""Selective Spectral Decay in a plain PyTorch loop: two lines around a training that is otherwise as before.

    python examples/plain_loop.py

The first layer starts with one component far above the rest, a stand-in for what pretraining with AdamW leaves behind.
Expect its largest singular value to fall from 8.0 to about 4.6 while the loss falls too; takes seconds on a CPU.
"""

import torch
from torch import nn

from s2d import SelectiveSpectralDecay

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
with torch.no_grad():
    model[0].weight += 8 * torch.outer(torch.ones(32) / 32**0.5, torch.ones(16) / 16**0.5)
x, target = torch.randn(512, 16) + 2, torch.randint(4, (512,))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

decay = SelectiveSpectralDecay(model, lam=1e-2, refresh_every=10)
decay.attach(optimizer)

for step in range(201):
    loss = nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # the penalty is added in here, after the clipping
    if step % 50 == 0:
        sigma = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
        print(f"step {step:3d}  loss {loss.item():.3f}  largest singular value {sigma:.2f}  {decay.summary()}")
