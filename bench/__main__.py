"""``python -m bench --family select``: check, time, print a table, write JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import harness
from vtkernels.testing.timer import Timing

console = Console(width=150, soft_wrap=False)


def _cell(result: harness.Result, peer: str) -> str:
    timing = result.peers.get(peer)
    if not isinstance(timing, Timing):
        return timing or ""
    ratio, target = result.ratio(peer), result.target.get(peer)
    verdict = "" if target is None else f" [green]>= {target:g}[/]" if ratio >= target else f" [red]< {target:g}[/]"
    return f"{timing.median:.3f} ({ratio:.2f}x{verdict})"


def _show(results: list[harness.Result]) -> None:
    for op in dict.fromkeys(r.op for r in results):
        rows = [r for r in results if r.op == op]
        peers = list(dict.fromkeys(p for r in rows for p in r.peers))
        table = Table(title=f"{op}: milliseconds, (ratio to ours)")
        for heading in ("case", "ours", *peers, "of floor", "GB/s", "of copy", "GFLOP/s"):
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for r in rows:
            # Bytes that stay in cache can move faster than a copy of main memory: above 100 % is not an error.
            spread = f"{r.ours.median:.3f} [{r.ours.fastest:.3f}-{r.ours.slowest:.3f}]"
            rates = (
                f"{r.floor_fraction:.0%}",
                f"{r.gigabytes_per_second:.1f}",
                f"{r.bandwidth_fraction:.0%}",
                f"{r.gigaflops:.0f}" if r.gigaflops else "",
            )
            table.add_row(r.name, spread, *(_cell(r, p) for p in peers), *rates)
        console.print(table)


def main(
    family: list[str] = typer.Option([], help="Family to run, repeatable; default all."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int = typer.Option(0, help="torch threads; 0 keeps torch's choice."),
    rounds: int = typer.Option(15, help="Interleaved rounds."),
    only: str = typer.Option("", help="Run the cases whose 'op name' contains this text."),
    out: Path | None = typer.Option(None, help="Write the results as JSON."),
) -> None:
    """Benchmarks our ops against their peers in one run on this machine."""
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    environment = harness.environment(place)
    console.print(environment)
    ceilings = harness.measure_ceilings(place)
    console.print(
        f"copy {ceilings.copy_bandwidth / 1e9:.1f} GB/s (read + written), "
        f"matrix product {ceilings.matmul_rate / 1e9:.0f} GFLOP/s"
    )
    results: list[harness.Result] = []
    for result in harness.run(family or harness.families(), place, ceilings, rounds, only):
        console.print(f"  {result.op} {result.name}: {result.ours.median:.3f} ms")
        results.append(result)
    _show(results)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment, **asdict(ceilings), "results": [asdict(r) for r in results]}
        out.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
