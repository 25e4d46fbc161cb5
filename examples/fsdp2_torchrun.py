"""Selective Spectral Decay under FSDP2 (fully_shard): no rank holds a whole weight, except during a refresh.

    torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py

Runs on GPUs with NCCL, without any on the CPU with gloo. A refresh gathers one layer a rank at a time; between
refreshes each rank adds its part of the penalty to its shard, without any exchange. With tensor parallelism the same
two lines do. Expect the largest singular value to fall from 8 to about 3.4; takes seconds.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from s2d import SelectiveSpectralDecay

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)  # the same weights on every rank
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(device)
with torch.no_grad():
    model[0].weight += 8 * torch.outer(torch.ones(32) / 32**0.5, torch.ones(16) / 16**0.5)
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after fully_shard, which replaces the parameters

decay = SelectiveSpectralDecay(model, lam=1e-2, refresh_every=10)
decay.attach(optimizer)

torch.manual_seed(1 + dist.get_rank())  # other data on every rank
x, target = torch.randn(256, 16, device=device) + 2, torch.randint(4, (256,), device=device)
for step in range(101):
    loss = nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # the penalty is added in here, after the clipping
    if step % 25 == 0 and dist.get_rank() == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}  {decay.summary()}")

dist.destroy_process_group()
