"""The command line, `ray-unlearn`.

Exit codes are 2 for wrong input (after one line on stderr), 1 for a failed run and 130 for Ctrl-C.
Most imports are inside the commands, so that `--help` need not wait for Ray.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer._click.exceptions import UsageError
from typer.core import TyperCommand

import deploy.commands
from pipelines.config.data import check_path
from pipelines.config.load import describe, load_config, model_at, preset_names
from pipelines.config.schema import ConfigError
from pipelines.config.text import one_line
from pipelines.data.synthetic import write_problem
from pipelines.terminal import Debug, RunDir, reporting

app = typer.Typer(
    name="ray-unlearn",
    help="Remove data's influence from a trained language model, at cluster scale, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help=f"A YAML file, or a preset: {', '.join(preset_names())}."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, for example train.steps=50."),
]


class CommandWithKeys(TyperCommand):
    """A command whose help ends with the configuration keys, collected when help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the keys with their defaults and meanings."""
        # click joins the lines of a paragraph unless it begins with \b.
        lines = ["\b", "Configuration keys, with their defaults:"]
        for key, default, meaning in describe():
            lines += [f"  {key} = {default}", f"      {meaning}"]
        self.epilog = "\n".join(lines)
        super().format_epilog(ctx, formatter)


@app.command(cls=CommandWithKeys)
def run(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Unlearn: solve or train the adapter, merge it, evaluate before, after and oracle,
    write the report.

    The same command continues an interrupted run. Results lie in the configuration's output_dir:
    adapter/ (PEFT), model/ (merged), scores.json, report.html, manifest.json, MLflow's store,
    run.log.
    """
    with reporting(debug) as terminal:
        cfg = load_config(config, overrides)
        from pipelines.evaluation.metrics.keys import terminal_titles
        from pipelines.unlearn import unlearn

        folder = unlearn(cfg, terminal)
        terminal.scores(folder.scores(), terminal_titles())
        terminal.say(f"Report: {folder.output.url}/report.html")


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="Plan for such GPUs, H100 for example, before there is a cluster."
        ),
    ] = "",
    price: Annotated[
        float, typer.Option(min=0, help="Of a GPU and hour: the table then says what a run costs.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Validate configuration, model, data and resources, and plan memory, time and cost.
    Trains nothing.

    With --gpu neither the cluster nor the data are looked at, and of the model its config.json
    alone.
    """
    with reporting(debug) as terminal:
        cfg = load_config(config, overrides)
        from pipelines.planning.check import check as check_run

        terminal.table(
            "What a run would do", check_run(cfg, terminal, gpu=gpu or None, price=price or None)
        )


@app.command()
def finetune(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Make a target model, or the retrain oracle, by training all parameters on the sets that
    finetune.sets names.
    """
    with reporting(debug) as terminal:
        cfg = load_config(config, overrides)
        from pipelines.unlearn import finetune as train_model

        terminal.say(f"Model: {train_model(cfg, terminal).output.url}/model")


@app.command()
def prepare(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Collect the statistics of all that a model was trained on, once for many requests.

    They are of data.forget, data.retain and data.utility, which a later request may part in another
    way. `ray-unlearn run ... solve.prepared=DIR` takes them, less its forget rows' part.
    """
    with reporting(debug) as terminal:
        cfg = load_config(config, overrides)
        from pipelines.unlearn import prepare as collect

        terminal.say(f"Statistics: {collect(cfg, terminal).output.url}")


@app.command()
def tune(
    config: Config,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML: configuration keys with distributions. Default: by mode."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials in all, those of a resumed search included.")
    ] = 60,
    method: Annotated[
        str, typer.Option(help="tpe (Optuna's, of both objectives), random or grid.")
    ] = "tpe",
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="A bound on the pick, as utility>=0.97 (the default); "
            "on distance, cost_s ... too. Repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in output_dir.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Search ranks, layers, targets, strengths and weights with Ray Tune: forgetting against
    kept utility.

    The first trial is the configuration as it is. Results lie in output_dir: best.yaml (for
    `ray-unlearn run`), its adapter/, search.html, trials.jsonl, space.yaml, MLflow's store.
    """
    with reporting(debug, going_on="The same command with --resume goes on") as terminal:
        cfg = load_config(config, overrides)
        from tuning.score import parse_constraints
        from tuning.search import SearchOptions, search

        constraints = parse_constraints(require or ())
        options = SearchOptions.of(trials, space, method, constraints, resume=resume)
        result = search(cfg, options, terminal)
        terminal.table(f"Trial {result.pick} of {len(result.trials)}", result.summary())
        terminal.say(f"Configuration: {result.best}")
        terminal.say(f"Page: {result.page}")


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(metavar="DIR", help="The model folder to score.")] = "",
    output: Annotated[str, typer.Option(metavar="FILE", help="Where the scores go, as JSON.")] = "",
    debug: Debug = False,
) -> None:
    """Score any model folder on the configuration's sets, beside the oracle if there is one."""
    with reporting(debug) as terminal:
        if not model:
            raise ConfigError("--model: missing, allowed: a model folder")
        cfg, scored = load_config(config, overrides), model_at(model, "--model")
        if not output:
            output = f"scores-{Path(model).resolve().parent.name}-{Path(model).name}.json"
        from pipelines.evaluation.metrics.keys import terminal_titles
        from pipelines.storage.atomic import check_writable
        from pipelines.unlearn import evaluate_model

        # Before hours of scoring.
        check_writable(output, "--output")
        evaluation = evaluate_model(cfg, scored, terminal).content()
        terminal.scores(evaluation, terminal_titles())
        text = json.dumps({"schema": 1, **evaluation}, indent=2, allow_nan=False)
        Path(output).write_text(text, encoding="utf-8")
        terminal.say(f"Scores: {output}")


@app.command()
def report(
    run_dir: RunDir,
    format: Annotated[
        Literal["html", "pdf", "open-unlearning"],
        typer.Option(
            help="The page; it and a PDF of it, printed by chromium or Chrome; or the scores on "
            "stdout as JSON, under the names of open-unlearning's TOFU evaluation."
        ),
    ] = "html",
    debug: Debug = False,
) -> None:
    """Rebuild a run's page, report.html, from the files beside it, or print its scores."""
    with reporting(debug) as terminal:
        from pipelines.report.open_unlearning import summary
        from pipelines.report.page import RUN_FILES, read_run, write_report
        from pipelines.report.pdf import write_pdf
        from pipelines.storage.output import open_output

        output = open_output(run_dir, "RUN_DIR")
        with output.local_copy(*RUN_FILES) as folder:
            if format == "open-unlearning":
                after = read_run(folder).scores["models"]["after"] or {}
                typer.echo(json.dumps(summary(after), indent=2))
                return
            page = write_report(folder)
            output.upload_file(page)
            if format == "pdf":
                page = write_pdf(page)
                output.upload_file(page)
        terminal.say(f"Report: {output.url}/{page.name}")


@app.command()
def verify(run_dir: RunDir, debug: Debug = False) -> None:
    """Compare every file of a run, and of the requests before it, with the manifests' digests;
    exit code 1 names what differs.

    The manifest itself, the page, the log and MLflow's store have no digest. A manifest is not
    signed: keep a copy of it elsewhere if somebody might write a new one. An earlier run that is
    neither where it was nor beside RUN_DIR is named, and is no difference.
    """
    with reporting(debug) as terminal:
        from pipelines.storage.output import open_output
        from pipelines.storage.verify import compare

        found = compare(open_output(run_dir, "RUN_DIR"))
        for line in found.differences + found.unreached:
            terminal.say(line)
        if found.differences:
            raise typer.Exit(1)
        terminal.say(f"Verified: {run_dir}")


@app.command()
def make_data(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="New folder for the five JSONL files.")
    ],
    authors: Annotated[int, typer.Option(help="Fictitious authors to learn; 2 to 1000.")] = 20,
    questions: Annotated[int, typer.Option(help="Question types for each author; 1 to 20.")] = 4,
    forget: Annotated[
        int, typer.Option(help="Authors that must be forgotten, fewer than --authors.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    debug: Debug = False,
) -> None:
    """Write a synthetic deletion problem: forget, retain, holdout, utility and general sets."""
    with reporting(debug) as terminal:
        check_path(str(folder), "DIR")
        sizes = {"authors": authors, "questions": questions, "forget": forget}
        try:
            counts = write_problem(folder, seed=seed, **sizes)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except OSError as error:
            raise ConfigError(
                f"DIR: {folder} cannot be written ({error.strerror}), allowed: a new folder"
            ) from None
        sets = ", ".join(f"{name} {rows} rows" for name, rows in counts.items())
        terminal.say(f"{folder}: {sets}")


app.add_typer(deploy.commands.app)


def main() -> None:
    """Run the console command."""
    try:
        code = app(prog_name="ray-unlearn", args=sys.argv[1:], standalone_mode=False)
    except UsageError as error:
        told = error.format_message()
        # A command without arguments shows its help. All else is one line.
        if not told.startswith("Usage: "):
            command = error.ctx.command_path if error.ctx else "ray-unlearn"
            told = one_line(f"{told.rstrip('.')}; allowed: {command} --help")
        typer.echo(told, err=True)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
