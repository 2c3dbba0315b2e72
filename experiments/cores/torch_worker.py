"""The same models in PyTorch: one process of `torch.distributed.pipelining`, or one that does all.

Answers as `worker.py` does. Needs torch, but not pdjax.
"""

# pyright: reportMissingImports=false

import argparse
import itertools
import json
import os
import sys
import time

import torch
from torch import nn

NUM_BLOCKS, WIDTH, NUM_HEADS, NUM_MICROBATCHES = 8, 256, 8, 8
SHAPES = {"transformer": (16, 128, WIDTH), "mlp": (512, WIDTH)}
UNCOUNTED = 4


class MLPBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gelu = nn.GELU(approximate="tanh")  # the form that Flax takes

    def forward(self, x):
        return x + self.mlp_out(self.gelu(self.mlp_in(self.norm(x))))


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = MLPBlock()

    def forward(self, x):
        batch, length, _ = x.shape
        parts = self.query_key_value(self.norm(x)).view(batch, length, 3, NUM_HEADS, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.mlp(x + self.out(y.transpose(1, 2).reshape(x.shape)))


def make_blocks(model, count):
    kind = MLPBlock if model == "mlp" else TransformerBlock
    return nn.Sequential(*(kind() for _ in range(count)))


class Pipe:
    """One of two stages, 1F1B."""

    def __init__(self, model):
        import torch.distributed as dist
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        host, port = os.environ["PDJAX_COORDINATOR"].split(":")
        self.rank = int(os.environ["PDJAX_PROCESS_ID"])
        dist.init_process_group(
            "gloo", init_method=f"tcp://{host}:{port}", world_size=2, rank=self.rank
        )
        self.blocks = make_blocks(model, NUM_BLOCKS // 2)
        stage = PipelineStage(self.blocks, self.rank, 2, torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=nn.functional.mse_loss)
        self.optimizer = make_optimizer(self.blocks)
        self.x, self.y = torch.randn(2, *SHAPES[model])

    def step(self):
        if self.rank == 0:
            self.schedule.step(self.x)
        else:
            self.schedule.step(target=self.y)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Single:
    """All blocks, over the microbatches of a minibatch in turn."""

    def __init__(self, model):
        self.blocks = make_blocks(model, NUM_BLOCKS)
        self.optimizer = make_optimizer(self.blocks)
        self.batch = torch.randn(2, *SHAPES[model])

    def step(self):
        for x, y in zip(*(part.chunk(NUM_MICROBATCHES) for part in self.batch), strict=True):
            (nn.functional.mse_loss(self.blocks(x), y) / NUM_MICROBATCHES).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_optimizer(blocks):
    return torch.optim.SGD(blocks.parameters(), lr=1e-3, momentum=0.9)


def step_s(system, count):
    """Seconds of a step."""
    for _ in range(UNCOUNTED):
        system.step()
    start = time.perf_counter()
    for _ in range(count):
        system.step()
    return (time.perf_counter() - start) / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=("pipe", "single"))
    parser.add_argument("model", choices=SHAPES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    system = (Pipe if arguments.system == "pipe" else Single)(arguments.model)
    step_s(system, 2)
    print(json.dumps("ready"), flush=True)
    for line in itertools.takewhile(str.strip, sys.stdin):
        print(json.dumps(step_s(system, int(line))), flush=True)


if __name__ == "__main__":
    main()
