"""Which hooks there are, in which order, and which are refused."""

import sys
from importlib import metadata
from random import Random

import pytest

from ckptd.config import Settings
from ckptd.errors import BadConfig, NotFound
from ckptd.hooks.builtin import BUILTINS
from ckptd.hooks.registry import Registry
from ckptd.hooks.spec import Kind, Priority, Spec
from tests.unit.hooks.conftest import SAVE, SAVED


def spec(name="h", **more):
    return Spec(**{"name": name, "kind": Kind.EXEC, "target": "/bin/true", "events": (SAVED,), **more})


def from_toml(*entries, **defaults):
    settings = {"hooks": entries, "hooks_defaults": {"entry_points": False, **defaults}}
    return Registry.from_settings(Settings.model_validate(settings))


def names(registry, event=SAVED):
    return [each.name for each in registry.of(event)]


@pytest.mark.parametrize("seed", range(5))
def test_fifty_hooks_run_by_priority_and_ties_by_registration(seed):
    """M050."""
    random = Random(seed)
    given = [(f"h{n}", random.choice([*Priority, 7, -3, 55, 5000])) for n in range(50)]
    registry = Registry([spec(name, priority=priority) for name, priority in given])
    assert names(registry) == [name for name, _ in sorted(given, key=lambda pair: pair[1])]
    order = [Priority.CRITICAL, Priority.HIGH, Priority.NORMAL, Priority.LOW, Priority.BACKGROUND]
    assert order == sorted(order)


def test_a_name_taken_is_refused_and_both_are_named():
    """M051."""
    with pytest.raises(BadConfig, match=r"two hooks are named 'same': /bin/true .* and /bin/false"):
        Registry([spec("same"), spec("same", target="/bin/false")])


def test_every_error_of_a_configuration_is_listed_at_once():
    with pytest.raises(BadConfig) as caught:
        from_toml(
            {"name": "a", "exec": ["true"], "events": ["checkpoint.published"]},
            {"name": "b", "exec": ["/bin/true"], "events": ["checkpoint.publishd"]},
            {"name": "c", "url": "http://example.org/", "events": ["checkpoint.published"]},
            {"name": "d", "builtin": "none-such"},
        )
    assert [p.split(":")[0] for p in caught.value.details["problems"]] == [f"hooks[{n}]" for n in range(1, 5)]
    assert "did you mean 'checkpoint.published'?" in caught.value.message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": ""}, "a name is"),
        ({"name": "a\nb"}, "a name is"),
        ({"events": ()}, "must name at least one"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"condition": "open('x')"}, "when: column 1"),
        ({"target": "true"}, "no absolute path"),
        ({"target": "/bin/true", "arguments": ("a\0b",)}, "no absolute path"),
        ({"options": {"a": 1}}, "takes arguments and environment"),
        ({"kind": Kind.PYTHON, "target": "os.system('x')"}, "is not"),
        ({"kind": Kind.INPROCESS, "target": "os:getcwd"}, "only what ckptd brings"),
        ({"kind": Kind.WEBHOOK, "target": "ftp://h/"}, "a webhook is https"),
        ({"kind": Kind.WEBHOOK, "target": "http://192.0.2.1/"}, "to this machine alone"),
        ({"kind": Kind.WEBHOOK, "target": "https://u:p@h/"}, "a secret belongs into a file"),
        ({"kind": Kind.WEBHOOK, "target": "https://h:99999/"}, "is no URL"),
        ({"kind": Kind.WEBHOOK, "target": "https://h/\r\nX: y"}, "is no URL"),
        ({"kind": Kind.WEBHOOK, "target": "https://h/", "events": (SAVE,)}, "is never asked"),
        ({"kind": Kind.WEBHOOK, "target": "https://h/", "options": {"secret": "x"}}, "knows no 'secret'"),
        ({"kind": Kind.WEBHOOK, "target": "https://h/", "options": {"secret_file": "x"}}, "absolute path"),
        ({"kind": Kind.WEBHOOK, "target": "https://h/", "options": {"retries_max": 1000}}, "retries_max"),
        ({"kind": Kind.MAIL, "target": "smtp://h"}, "must have sender and to"),
        ({"kind": Kind.MAIL, "target": "https://h"}, "a mail server is written"),
        ({"events": (SAVE,), "priority": Priority.BACKGROUND}, "nothing waits for one in the background"),
    ],
)
def test_a_hook_that_can_not_be_is_refused_with_the_reason(wrong, said):
    with pytest.raises(BadConfig, match=said):
        Registry([spec(**wrong)])


def test_hooks_are_switched_off_and_on_without_a_restart():
    """M064."""
    registry = Registry([spec("a"), spec("b")])
    registry.disable("a")
    assert (names(registry), registry.get("a").enabled, len(registry)) == (["b"], False, 2)
    registry.enable("a")
    assert names(registry) == ["a", "b"]
    with pytest.raises(NotFound, match="no hook named 'c'"):
        registry.enable("c")


def test_one_switch_turns_all_hooks_off():
    """M064: enable_hooks."""
    entry = {"exec": ["/bin/true"], "events": ["checkpoint.published"]}
    assert names(from_toml(entry)) == ["/bin/true"]
    off = from_toml(entry, enabled=False)
    assert (names(off), len(off)) == ([], 1)


def test_what_the_configuration_says_wins_and_the_rest_the_code_says():
    registry = from_toml(
        {"name": "a", "python": "m:f", "priority": "critical"}, {"name": "b", "python": "m:f"}, timeout_s=3.0
    )
    told = {"name": "f", "events": ["checkpoint.published"], "priority": 70, "timeout_s": 0.3}
    for name in ("a", "b"):
        assert registry.of(SAVED) == () or name == "b"
        registry.declare(name, [told])
    a, b = registry.get("a"), registry.get("b")
    assert (a.priority, a.timeout_s, b.priority, b.events) == (Priority.CRITICAL, 0.3, 70, (SAVED,))
    assert registry.undeclared == ()


def test_a_module_with_several_hooks_stands_for_all_of_them_in_its_place():
    registry = from_toml(
        {"name": "first", "exec": ["/bin/true"], "events": [str(SAVED)]},
        {"name": "team", "python": "m"},
        {"name": "last", "exec": ["/bin/true"], "events": [str(SAVED)]},
    )
    told = {"events": [str(SAVED)], "priority": None, "timeout_s": None}
    registry.declare("team", [{"name": "x", **told}, {"name": "y", **told}])
    assert names(registry) == ["first", "team.x", "team.y", "last"]
    assert registry.get("team.x").target == "m:@x"


def test_a_python_hook_that_names_no_event_is_listed_with_its_problem():
    registry = from_toml({"name": "a", "python": "m:f"})
    registry.declare("a", [{"name": "f", "events": [], "priority": None, "timeout_s": None}])
    assert "at which events" in registry.get("a").problem
    assert registry.undeclared == ()


def test_installed_hooks_are_known_and_their_modules_never_imported(monkeypatch):
    """Entry points of the group ckptd.hooks: their modules are looked at in a child host only."""
    point = metadata.EntryPoint("theirs", "this_module_must_not_be_imported:hook", "ckptd.hooks")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "ckptd.hooks" else [])
    registry = Registry.from_settings(Settings())
    theirs = registry.get("theirs")
    assert (theirs.kind, theirs.source, theirs.target) == (Kind.PYTHON, "entry point", point.value)
    assert "this_module_must_not_be_imported" not in sys.modules
    assert len(Registry.from_settings(Settings.model_validate({"hooks_defaults": {"entry_points": False}}))) == 0


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_every_builtin_hook_can_be_named_in_the_configuration(name):
    (found,) = from_toml({"builtin": name})
    assert (found.name, found.source) == (name, "built-in")
    assert found.events == BUILTINS[name].events


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_a_builtin_hook_keeps_its_priority_when_its_class_has_been_asked(name):
    """Reading tensors waits for the others: what any class says by default must not promote it."""
    registry = from_toml({"builtin": name})
    registry.declare(name, [{"name": name, "events": [], "priority": 50, "timeout_s": None}])
    assert registry.get(name).priority == BUILTINS[name].priority
    registry = from_toml({"builtin": name, "priority": "high"})
    assert registry.get(name).priority == Priority.HIGH


def test_hooks_that_are_off_are_not_imported():
    """M064: neither one that is disabled nor, with the switch off, any."""
    assert [spec.name for spec in from_toml({"python": "m:f"}, {"python": "n:f", "enabled": False}).undeclared] == [
        "m:f"
    ]
    assert from_toml({"python": "m:f"}, enabled=False).undeclared == ()


def test_the_longest_rest_is_not_shorter_than_the_first():
    with pytest.raises(ValueError, match="rest_s_max"):
        Settings.model_validate({"hooks_defaults": {"rest_s": 10, "rest_s_max": 5}})


def test_an_entry_is_exactly_one_kind_of_hook():
    for entry in ({}, {"python": "m:f", "exec": ["/bin/true"]}):
        with pytest.raises(ValueError, match="exactly one of python, exec, url, mail and builtin"):
            Settings.model_validate({"hooks": [entry]})
