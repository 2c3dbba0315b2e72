"""Two stages in two pinned processes, against the most that two cores can do.

    python experiments/cores/benchmark.py [--model mlp] [--rounds 7] [--torch PYTHON]

PYTHON is one of an environment that has PyTorch, which then takes its turns, too. All systems are
started once, and the noise of the machine hits all of them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pdjax.launch import free_port, variables

HERE = Path(__file__).parent
WORKER = HERE / "worker.py"
BUBBLES = {"1F1B": 8 / 9, "PipeDream": 1.0}
"""For each schedule the share of the time in which a worker computes at best."""
STEPS = {"transformer": 6, "mlp": 16}


class System:
    """Some processes, each pinned to a core, that take steps together when told."""

    def __init__(self, name, model, cores, python=None):
        command = [python, HERE / "torch_worker.py"] if python else [sys.executable, WORKER]
        coordinator = f"127.0.0.1:{free_port()}"
        self.processes = []
        for number, core in enumerate(cores):
            told = variables(coordinator, len(cores), number)
            self.processes.append(
                subprocess.Popen(
                    ["taskset", "-c", str(core), *command, name, model],
                    env=os.environ | told | {"JAX_PLATFORMS": "cpu"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def run(self, steps):
        """Seconds of a step, by the slowest of the processes."""
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return max(self.answers())

    def answers(self):
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def end(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait(30)


def measure(model, rounds, torch=None):
    """For each system the seconds of a step, round by round."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    one, two = [cores[0]], cores
    systems = {}
    for name in BUBBLES:
        systems[name] = System(f"pipe:{name},0", model, two)
        systems[f"{name}, slack 1"] = System(f"pipe:{name},1", model, two)
        for stage in (0, 1):
            spec = f"stage:{name},{stage}"
            systems[f"stage {stage} of {name}"] = System(spec, model, [cores[stage]])
        systems[f"one process, both stages of {name}"] = System(f"both:{name},0", model, one)
    systems |= {
        "one process, microbatches": System("loop:8", model, one),
        "one process, microbatches, call by call": System("calls:8", model, one),
        "one process, whole": System("loop:1", model, one),
    }
    if torch:
        systems["PyTorch: 1F1B"] = System("pipe", model, two, torch)
        systems["PyTorch: one process"] = System("single", model, one, torch)
    pairs = {
        f"two processes, both stages of {name}": System(f"both:{name},0", model, two[1:])
        for name in BUBBLES
    }
    pairs |= {
        "two processes, microbatches": System("loop:8", model, two[1:]),
        "two processes, whole": System("loop:1", model, two[1:]),
    }
    for system in (*systems.values(), *pairs.values()):
        system.answers()  # it is ready
    found = {name: [] for name in (*systems, *pairs)}
    for _ in range(rounds):
        for name, system in systems.items():
            found[name].append(system.run(STEPS[model]))
        for name, other in pairs.items():
            first = systems[name.replace("two processes", "one process")]
            found[name].append(_at_once(first, other, STEPS[model]))
    for system in (*systems.values(), *pairs.values()):
        system.end()
    return found


def _at_once(first, second, steps):
    """Seconds of a minibatch where two systems take steps at once: each does half of them."""
    for process in (*first.processes, *second.processes):
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    rates = [1 / s for system in (first, second) for s in system.answers()]
    return 1 / sum(rates)


def ratios(found):
    """The goals: name, and for each round the ratio of the two times."""
    seconds = {name: np.asarray(values) for name, values in found.items()}
    for name, bubble in BUBBLES.items():
        own = np.maximum(*(seconds[f"stage {stage} of {name}"] for stage in (0, 1))) / bubble
        turns = seconds[f"two processes, both stages of {name}"] / bubble
        whole = "whole" if name == "PipeDream" else "microbatches"
        for system in (name, f"{name}, slack 1"):
            pipe = seconds[system]
            yield f"{system}: slower stage's own operations / bubble over pipeline", own / pipe
            yield (
                f"{system}: two processes, both stages in turn / bubble over pipeline",
                turns / pipe,
            )
            plain = seconds[f"two processes, {whole}"] / bubble
            yield f"{system}: two processes, a plain step / bubble over pipeline", plain / pipe
            yield f"{system}: one process over pipeline", seconds[f"one process, {whole}"] / pipe
    calls, loop = (seconds[f"one process, microbatches{how}"] for how in (", call by call", ""))
    yield "one process: call by call over one program", calls / loop
    if "PyTorch: 1F1B" not in seconds:
        return
    pipe = seconds["1F1B, slack 1"]
    theirs, their_single = seconds["PyTorch: 1F1B"], seconds["PyTorch: one process"]
    yield "PyTorch: one process over pipeline", their_single / theirs
    # PyTorch's one process makes a call for each microbatch, too: so does a pipeline.
    for how, single in (("call by call", calls), ("one program", loop)):
        gain = (single / pipe) / (their_single / theirs)
        yield f"kernels' share: PyTorch's one process over ours, {how}", their_single / single
        yield f"pipeline's share: our speed-up over {how} over PyTorch's", gain
    yield "both: PyTorch's 1F1B over ours", theirs / pipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=STEPS, nargs="*", default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", metavar="PYTHON", help="one with PyTorch")
    arguments = parser.parse_args()
    for model in arguments.model:
        found = measure(model, arguments.rounds, arguments.torch)
        print(f"\n{model}\n\n| | ms a minibatch | quartiles |\n|---|---:|---|")
        for name, values in found.items():
            low, middle, high = np.percentile(np.asarray(values) * 1e3, (25, 50, 75))
            print(f"| {name} | {middle:.1f} | {low:.1f}-{high:.1f} |")
        print("\n| ratio | median | quartiles |\n|---|---:|---|")
        for name, values in ratios(found):
            low, middle, high = np.percentile(values, (25, 50, 75))
            print(f"| {name} | {middle:.2f} | {low:.2f}-{high:.2f} |")


if __name__ == "__main__":
    main()
