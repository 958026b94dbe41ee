"""The ``vtk`` command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Visual Token Kernels.")
console = Console()


@app.command()
def demo(
    image: Path | None = typer.Option(None, help="A picture; default: a photograph from scikit-image."),
    model: Path | None = typer.Option(None, help="A local Hugging Face LLaVA checkpoint; default: random weights."),
    method: list[str] = typer.Option(["fastervlm", "hiprune", "todre"], help="Pruning method, repeatable."),
    keep: int = typer.Option(64, help="Visual tokens to keep of each image."),
    question: str = typer.Option("What is in this picture?", help="Asked of a checkpoint."),
    new_tokens: int = typer.Option(16, help="Tokens to decode."),
    rounds: int = typer.Option(3, help="Timed repetitions; the table has their medians."),
    device: str = typer.Option("auto", help="cpu, cuda or auto."),
    out: Path = typer.Option(Path("demo.png"), help="Where to draw the kept patches."),
) -> None:
    """Prunes the visual tokens of a real VLM with our kernels and shows what that saves."""
    _need("transformers", "skimage", "matplotlib", "PIL")
    from vtkernels import demo as run

    try:
        run.main(console, image, model, method, keep, question, new_tokens, rounds, device, out)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        _stop(str(error))


@app.command()
def methods() -> None:
    """Lists the pruning methods of the zoo."""
    _need("transformers")
    from vtkernels import zoo

    table = Table()
    for heading in ("name", "method", "stages", "needs [CLS]", "reads question", "options", "facts"):
        table.add_column(heading, overflow="fold")
    for entry in zoo.methods():
        options = ", ".join(f"{name}={value!r}" for name, value in entry.options.items())
        table.add_row(
            entry.name,
            f"{entry.title}\n[dim]{entry.reference}[/]",
            ", ".join(entry.stages),
            "yes" if entry.needs_cls else "",
            "yes" if entry.reads_question else "",
            options,
            entry.status,
        )
    console.print(table)


@app.command()
def env() -> None:
    """Prints versions, instruction set, GPU and loaded libraries."""
    from vtkernels.collect_env import collect

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in collect().items():
        table.add_row(name, value)
    console.print(table)


def _need(*modules: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        _stop(f"this command needs {', '.join(missing)}: pip install 'vtkernels[demo]'")


def _stop(message: str) -> None:
    console.print(f"[red]vtk:[/] {message}", highlight=False)
    raise typer.Exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
