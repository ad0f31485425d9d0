"""One fitting step of MS-Former on every backend: time, and the memory that the step adds.

    pip install ".[bench]"
    python -m benchmarks.fit_step [--size 257] [--embed-dim 100] [--depth 2] [--threads N] [--rounds 5]

Each backend runs in a process of its own, with the same weights and image. A step is forward, losses, backward and
optimiser. Processes take turns, one step each a round; the median over rounds is reported, and the ratio to the
reference backend. Memory is the peak of the process over all its steps less what it held before the first.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

import click


def current_memory() -> float:
    """Resident memory of this process, MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def serve(backend: str, size: int, embed_dim: int, depth: int, threads: int) -> None:
    """Makes a step for every line on standard input; answers its seconds and the loss, at the end the memory."""
    import torch

    import msformer_kernels
    from msformer.losses import LossWeights, total_loss
    from msformer.model import MSFormer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MSFormer(embed_dim=embed_dim, depth=depth)
    image = torch.rand(1, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    before = current_memory()
    with msformer_kernels.use_backend(backend):
        for _ in sys.stdin:
            started = time.perf_counter()
            output = model(image)
            loss = total_loss(output, output.logits.argmax(1), LossWeights())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(time.perf_counter() - started, loss.item(), peak_memory() - before, flush=True)


@click.command()
@click.option("--size", default=257, show_default=True)
@click.option("--embed-dim", default=100, show_default=True)
@click.option("--depth", default=2, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--serve", "served", hidden=True)
def main(size: int, embed_dim: int, depth: int, threads: int, rounds: int, served: str | None) -> None:
    """Times one fitting step of MS-Former on every backend."""
    if served:
        serve(served, size, embed_dim, depth, threads)
        return
    import msformer_kernels

    options = ["--size", size, "--embed-dim", embed_dim, "--depth", depth, "--threads", threads]
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fit_step", *map(str, options), "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in msformer_kernels.available_backends()
    }
    answers: dict[str, list[tuple[float, float, float]]] = {name: [] for name in processes}
    for _ in range(rounds + 1):  # the first round warms up
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, loss, memory = map(float, process.stdout.readline().split())
            answers[name].append((seconds, loss, memory))
    for process in processes.values():
        process.communicate()
    baseline = statistics.median(answer[0] for answer in answers["reference"][1:])
    click.echo(f"one fitting step, {size} x {size}, C = {embed_dim}, depth {depth}, {threads} threads; {rounds} rounds")
    for name, found in answers.items():
        seconds = statistics.median(answer[0] for answer in found[1:])
        click.echo(
            f"{name:<10} {seconds:7.3f} s   {baseline / seconds:5.2f} x   {found[-1][2]:7.0f} MiB   "
            f"first loss {found[0][1]:.5f}"
        )


if __name__ == "__main__":
    main()
