"""The commands of versions: `finegrid build`, `dvc`, `restore`, …; joined to the others in :mod:`finegrid.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finegrid import layout

app = typer.Typer()
StudyName = Annotated[str, typer.Argument(help="Name of a file in config/studies.", show_default=False)]


@app.command()
def dvc() -> None:
    """Write dvc.yaml anew from the files of config/studies; a snakemake that ends well does so too."""
    from finegrid.versions import write_pipeline

    print("dvc.yaml written" if write_pipeline(Path()) else "dvc.yaml is that of config/studies already")


@app.command()
def build(
    target: Annotated[str, typer.Argument(help="A study, or the path of a data set, token set or base model.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="For snakemake, after `--`.")] = None,
) -> None:
    """Run snakemake as the stages of dvc.yaml do: with the profile of params.yaml or SNAKEMAKE_PROFILE."""
    from finegrid.versions import build

    build(target, arguments or [])


@app.command()
def restore(
    study: StudyName,
    run: Annotated[str | None, typer.Option(help="Only this run of it.")] = None,
) -> None:
    """Bring a study's results from the DVC remote into a clone, and let Snakemake know that they are finished."""
    from finegrid.restore import restore
    from finegrid.study import load_study

    the_study = load_study(layout.study_file(study), Path.cwd())
    restore(the_study, the_study.run(run) if run else None)


@app.command()
def trace(
    target: Annotated[str, typer.Argument(help="Figure (quality), table (arms.tex), number (\\\\name), or a file.")],
    study: Annotated[str | None, typer.Option(help="Study, where several have it.")] = None,
) -> None:
    """Print what a figure, table or number rests on, back to the raw data, and check every hash on the way.

    Ends with status 1 if a file is not the one that was used.
    """
    from finegrid.trace import trace

    if not trace(target, study):
        raise SystemExit(1)


@app.command()
def verify(
    study: StudyName,
    run: Annotated[str | None, typer.Option(help="This run; default: one drawn at random.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Allowed difference of a metric; default: none on the CPU, 0.02 elsewhere.")
    ] = None,
    scratch: Annotated[Path, typer.Option(envvar="FINEGRID_SCRATCH", help="As in config.yaml.")] = Path("scratch"),
) -> None:
    """Train and score a run once more in a scratch folder: are its metrics those on record?

    Ends with status 1 if they are not.
    """
    from finegrid.study import load_study
    from finegrid.verify import verify

    the_study = load_study(layout.study_file(study), Path.cwd())
    if not verify(the_study, the_study.run(run) if run else None, scratch, tolerance):
        raise SystemExit(1)


@app.command("add-data")
def add_data(
    name: Annotated[str, typer.Argument(help="Name of the data set.", show_default=False)],
    files: Annotated[list[Path] | None, typer.Argument(help="Files, with train, val or test in their names.")] = None,
    train: Annotated[Path | None, typer.Option(help="File of the train split, whatever its name.")] = None,
    validation: Annotated[Path | None, typer.Option(help="The same for validation.")] = None,
    test: Annotated[Path | None, typer.Option(help="The same for test.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of the answer.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text files that are not UTF-8, such as gb18030.")] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe whose other settings are taken over.")] = Path(
        "config/recipes/lora.yaml"
    ),
) -> None:
    """Put your own files under DVC in data/raw, after a check of every row, and write a recipe for them.

    The same again with a changed file makes a new version of it.
    """
    from finegrid.add_data import add_data

    given = {"train": train, "validation": validation, "test": test}
    columns = {key: column for key, column in {"prompt": prompt, "answer": answer}.items() if column}
    reading = ({"columns": columns} if columns else {}) | ({"encoding": encoding} if encoding else {})
    add_data(name, files or [], given, reading, recipe)
