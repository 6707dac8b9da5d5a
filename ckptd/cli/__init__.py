"""`ckpt`, the command line: asks the daemon, prints the answer, exits with a code that scripts can rely on.

A verb is one function in the file of its family; VERBS below says which, so that `ckpt --help` and
each verb import only what they need. Standard output carries data, standard error carries talk.
Exit codes are those of ckptd.errors (docs/reference/exit-codes.md); no traceback reaches a person
unless CKPTD_DEBUG=1.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from ckptd import __version__
from ckptd.cli import render
from ckptd.cli.options import Globals, global_options
from ckptd.errors import CkptdError

INTERRUPTED = 130
COMPLETE_VARIABLE = "_CKPT_COMPLETE"  # set by the script of `ckpt completion`
PIPE_CLOSED = 141  # 128 + SIGPIPE, what a shell reports for any program whose reader has gone


class Entry(NamedTuple):
    """Where a verb is defined, and its line in `ckpt --help` (equal to its own short help)."""

    module: str
    function: str
    help: str


VERBS: dict[str, dict[str, Entry]] = {
    "Look": {
        "status": Entry("watching", "status", "What the daemon is doing: arenas, jobs, roots, experiments, disks."),
        "ls": Entry(
            "listing", "ls", "List checkpoints, newest first; those that were dropped or replaced only when asked for."
        ),
        "experiments": Entry("listing", "experiments", "List experiments, newest first."),
        "grid": Entry("training", "grid", "Show how a sweep is doing: progress, time left, and who has fallen silent."),
        "show": Entry("listing", "show", "Everything known about one checkpoint."),
        "recovery": Entry(
            "training",
            "recovery",
            "Show how an experiment can go on: its last good checkpoint, and the command that it was started with.",
        ),
        "best": Entry("besting", "best", "Show the best checkpoints by each rule, or decide them again."),
        "path": Entry("listing", "path", "Print where a checkpoint lies, and nothing else."),
        "stats": Entry("measuring", "stats", "How fast saves are, how much they write, what they cost training."),
        "top": Entry("measuring", "top", "Watch the daemon work: rates, memory, jobs, experiments, disks."),
        "log": Entry("watching", "log", "What happened: events, or with --audit who did what."),
    },
    "Act": {
        "submit": Entry("handing", "submit", "Hand over a checkpoint that a program has written."),
        "wait": Entry("watching", "wait", "Wait until a checkpoint is durable, or better."),
        "verify": Entry("verifying", "verify", "Read checkpoints back from the disk and compare their digests."),
        "pin": Entry("acting", "pin", "Keep a checkpoint, whatever the rules say."),
        "unpin": Entry("acting", "unpin", "Lift a pin."),
        "unveto": Entry("acting", "unveto", "Let a checkpoint count whose save a hook vetoed."),
        "measured": Entry("besting", "measured", "Say what was measured of a checkpoint after its save."),
        "tag": Entry("acting", "tag", "Give a checkpoint a tag."),
        "untag": Entry("acting", "untag", "Take a tag away from a checkpoint."),
        "rm": Entry("acting", "rm", "Remove checkpoints, unless something holds them."),
        "restore": Entry(
            "acting",
            "restore",
            "Bring back what lies in the trash: a checkpoint, or the optimizer states that were taken out of one.",
        ),
        "bulk": Entry(
            "bulk", "bulk", "Act on every checkpoint that a query finds: tag, untag, pin, unpin, rm, verify."
        ),
        "cleanup": Entry(
            "cleaning",
            "cleanup",
            "Find checkpoints that are damaged, missing or failed; with --confirm take them away.",
        ),
        "retention": Entry("retaining", "retention", "Show or carry out what the retention rules decide."),
    },
    "Care": {
        "doctor": Entry("checking", "doctor", "Check everything that usually goes wrong; exit 1 when something has."),
        "config": Entry("configuring", "config", "Show the configuration and where it comes from, or check it."),
        "cache": Entry("caching", "cache", "List the files that were fetched back from an archive, or give some up."),
        "hooks": Entry("hooking", "hooks", "List hooks, try one, switch one on or off, see how they do."),
        "roots": Entry("tending", "roots", "List the directory trees that ckptd manages or watches, or add one."),
        "watch-root": Entry("tending", "watch_root", "Watch a directory that other programs write to."),
        "rebuild": Entry("tending", "rebuild", "Make the catalog again from the manifests on disk."),
        "reload": Entry("tending", "reload", "Make the daemon read its configuration again."),
        "stop": Entry("tending", "stop", "Stop the daemon once its running jobs are done."),
        "completion": Entry("completion", "completion", "Print the completion script of a shell."),
    },
}

_EXAMPLES = (
    ("ckpt ls imagenet/resnet50", "its checkpoints"),
    ("ckpt path imagenet/resnet50@best:val_loss", "where the best one lies"),
    ("ckpt status", "what the daemon is doing"),
    ("ckpt rm --dry-run 6f1c0e", "what removing it would do"),
)


class Verbs(click.Group):
    """The group of all verbs; loads a verb's file when the verb is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the verbs in the order of the help."""
        return [name for family in VERBS.values() for name in family]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import a verb's file and return the verb; None when there is no such verb."""
        entry = next((family[cmd_name] for family in VERBS.values() if cmd_name in family), None)
        if entry is None:
            return None
        found: click.Command = getattr(importlib.import_module(f"ckptd.cli.{entry.module}"), entry.function)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; a wrong one is answered with the verb that was probably meant."""
        name = args[0]
        if ctx.resilient_parsing or name.startswith("-") or self.get_command(ctx, name):
            return super().resolve_command(ctx, args)
        import difflib

        near = difflib.get_close_matches(name, [*self.list_commands(ctx), *_TAUGHT], n=1)
        meant = _TAUGHT.get(name) or (near and (_TAUGHT.get(near[0]) or near[0]))
        said = f"no verb {name!r}." + (f" Did you mean '{meant}'?" if meant else "")
        raise click.UsageError(said, ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples first, then the verbs by family, then the options."""
        formatter.write_usage("ckpt", "VERB [ARGUMENTS]...")
        render.write_examples(formatter, _EXAMPLES)
        for family, verbs in VERBS.items():
            with formatter.section(family):
                formatter.write_dl([(name, entry.help) for name, entry in verbs.items()], col_max=14)
        self.format_options(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text("`ckpt VERB -h` tells more about each. Exit codes: docs/reference/exit-codes.md.")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options alone: click would list the commands here again."""
        click.Command.format_options(self, ctx, formatter)


# What other tools taught people to type, and what it is called here.
_TAUGHT = {
    "list": "ls",
    "describe": "show",
    "get": "show",
    "info": "show",
    "inspect": "show",
    "resolve": "path",
    "resume": "path",
    "delete": "rm",
    "remove": "rm",
    "gc": "retention plan",
    "prune": "retention plan",
    "forget": "retention plan",
    "check": "verify",
    "fsck": "verify",
    "ps": "status",
    "metrics": "stats",
    "statistics": "stats",
    "events": "log",
    "logs": "log",
    "hold": "pin",
    "undelete": "restore",
    "release": "unpin",
    "accept": "unveto",
    "allow": "unveto",
    "approve": "unveto",
    "runs": "experiments",
    "health": "doctor",
    "diagnose": "doctor",
    "save": "submit",
    "watch": "watch-root",
}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value and not ctx.resilient_parsing:
        sys.stdout.write(f"ckpt {__version__}\n")
        ctx.exit()


ckpt = Verbs(
    name="ckpt",
    params=[
        *global_options(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; never raises, KeyboardInterrupt included.

    Blocks for as long as the verb does. Everything a person can cause ends in one line on standard
    error and an exit code; a defect of ckptd itself ends in one line with the code `internal`.
    """
    asked = Globals()
    render.prepare_streams()
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv), asked)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has had enough. Python flushes stdout once more at exit: give it
        # a place where that can't fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (KeyboardInterrupt, EOFError, click.Abort):
        return INTERRUPTED
    except CkptdError as error:
        render.complain(error, as_json=asked.as_json)
        return error.exit_code
    except click.ClickException as error:
        return render.complain_usage(error, as_json=asked.as_json)
    except Exception as error:  # noqa: BLE001 - the border: a defect becomes one line, not a traceback
        return render.complain_bug(error, as_json=asked.as_json)
    return code


def _run(words: list[str], asked: Globals) -> int:
    """Parse and invoke, or answer a shell that completes. Not click's own main: it takes broken pipes for itself."""
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(ckpt, {"obj": asked}, "ckpt", COMPLETE_VARIABLE, instruction)
    try:
        with ckpt.make_context("ckpt", words, obj=asked) as context:
            code: Any = ckpt.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return code if isinstance(code, int) else 0
