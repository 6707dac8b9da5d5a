"""The reference is true: its example runs as written, and its tables say what the code does."""

import re

from ckptd.hooks import accept, child, host
from ckptd.hooks.result import Outcome
from ckptd.hooks.spec import Kind, Priority, Spec
from tests.support import pages, tree
from tests.unit.hooks.conftest import SAVE, context

PAGE = "docs/reference/hooks.md"


async def test_the_documented_example_runs_as_it_is_written(running, runs, tmp_path):
    """M051, M052, row 30: a plain function and a class with its priority in the constructor, registered by name."""
    (tmp_path / "documented.py").write_text(pages.blocks(PAGE, "python")[0])
    spec = Spec(name="my", kind=Kind.PYTHON, target="documented", import_path=(str(tmp_path),), timeout_s=30.0)
    async with running([spec]) as runner:
        assert (await runner.ask(context(loss=11.0))).allowed
        assert [(run.hook, run.outcome) for run in runs] == [
            ("my.ValidationHook", Outcome.OK),
            ("my.logger", Outcome.OK),
        ]
        assert runs[0].output == "Warning: High loss detected!\n"
        assert runs[1].output == "Saving checkpoint for experiment e1\n"
        assert runner.registry.get("my.ValidationHook").priority == Priority.HIGH
        assert runner.registry.get("my.logger").events == (SAVE,)


def test_the_reference_names_every_option_variable_and_priority():
    spans = set(pages.spans(PAGE))
    assert {option for options in accept.OPTIONS.values() for option in options} <= spans
    assert set(host._OWN) | {"CKPTD_HOOK"} <= spans
    assert spans >= child._KEPT
    text = tree.text(PAGE)
    for priority in Priority:
        assert f"`{priority.name.lower()}` {int(priority)}" in text
    for outcome in Outcome:
        assert f"`{outcome}`" in text
    assert f"exit status {host.VETO_STATUS};" in text


def test_the_reference_names_every_header_of_a_webhook():
    source = tree.text("ckptd/hooks/webhook.py")
    sent = set(re.findall(r'"((?:Ckptd|Idempotency)-\w+)"', source))
    assert len(sent) == 4
    assert sent <= set(pages.spans(PAGE))
