"""Standard tasks of EleutherAI's lm_eval: found, loaded and refused before any model is read.

lm_eval is optional, and nothing imports it before a task is asked for. Each task is loaded with its data set, its
requests are made, and it is rehearsed on two documents with made-up answers: that finds a package that is missing, or a
metric that would be downloaded as code, which else would be found when the first model has answered for hours.
"""

import difflib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from logitwise.comparison.contained import Contained, contained
from logitwise.errors import RecipeError
from logitwise.machine import repeatable
from logitwise.watch import Watcher

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "few_shot": 1234}
"""lm_eval's own, which others' figures are made with too; not those of the comparison."""

REHEARSED = 2
"""Documents of a rehearsal: some metrics, such as correlations, need more than one."""

UNSAFE = "it runs code that a model has written"
NO_CODE = "run it with lm_eval's own command where that is safe"


@dataclass(frozen=True)
class Item:
    """A task or a group of them, as it is asked for and shown.

    Args:
        built: lm_eval's own object.
        origin: "lm_eval", or the name of the user's file or folder.
    """

    built: Any
    origin: str

    @property
    def name(self) -> str:
        """As lm_eval knows it."""
        return str(getattr(self.built, "task_name", None) or self.built.name)

    @property
    def parts(self) -> list["Item"]:
        """What a group consists of; nothing of a task."""
        return [] if hasattr(self.built, "task_name") else [Item(part, self.origin) for part in self.built]

    @property
    def tasks(self) -> list[Any]:
        """The tasks in it, at any depth, or itself."""
        return [self.built] if hasattr(self.built, "task_name") else list(self.built.get_all_tasks())


@dataclass(frozen=True)
class Harness:
    """What every model is asked.

    Args:
        items: tasks and groups, in the order they were asked for.
        digests: of each task's requests, documents and settings, by its name.
        limit: how many documents of each task, the first ones; None: all.
        version: of lm_eval.
    """

    items: list[Item]
    digests: dict[str, str]
    limit: int | None
    version: str


def load_tasks(asked: Sequence[str], limit: int | None, watcher: Watcher) -> Harness:
    """lm_eval's tasks, ready to run.

    Args:
        asked: names of tasks, groups or tags of lm_eval; paths of a task's .yaml, or of a folder of them, of which all
            are meant. A path has a separator in it, or ends in .yaml. Functions that such a file names are run.
        limit: how many documents of each task.

    Errors: RecipeError where lm_eval is not installed, a task is unknown, its data set cannot be had, it needs a
    package that is not there, it would run code that is downloaded or written by a model, or it does not run.
    """
    _check_installed()
    with repeatable(), contained() as held, watcher.stage("Loading lm_eval's tasks", 1 + len(asked)) as stage:
        paths = [name for name in asked if _is_path(name)]
        for path in paths:
            if not Path(path).exists():
                raise RecipeError(f"there is no task {path}", "there is no such file or folder", "correct the path")
        manager = _manager(paths, with_own=len(paths) < len(asked))
        stage.advance()
        items: list[Item] = []
        for name in asked:
            items += _load(manager, name, held)
            stage.advance()
        _check_twice(items)
        digests = {task.task_name: _prepared(task, limit, held) for item in items for task in item.tasks}
    return Harness(items, digests, limit, metadata.version("lm_eval"))


def _check_installed() -> None:
    try:
        import datasets
        from lm_eval.tasks.manager import TaskManager  # noqa: F401  (since 0.4.12)
    except ImportError as error:
        raise RecipeError(
            "lm_eval 0.4.12 or later is not installed",
            f"--lm-eval runs its tasks ({error})",
            'pip install "logitwise[lm-eval]", or leave --lm-eval out',
        ) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        why = f"datasets {datasets.__version__} runs code that a data set brings with it"
        raise RecipeError("tasks of lm_eval are not loaded", why, 'pip install "datasets>=4"')


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith((".yaml", ".yml"))


def _manager(paths: Sequence[str], with_own: bool) -> Any:
    """lm_eval's index of tasks. Its own 14,000 files are read only where needed: that takes ten seconds."""
    from lm_eval.tasks.manager import TaskManager

    folders = [path for path in paths if Path(path).is_dir()]
    files = [Path(path).read_text(encoding="utf-8", errors="replace") for path in paths if path not in folders]
    if with_own or any(re.search(r"^group\s*:", text, re.MULTILINE) for text in files):
        return TaskManager(include_path=folders)
    manager = TaskManager(include_path=folders, include_defaults=False)
    named = {name for entry in manager.task_index.values() for name in _members(entry.cfg)}
    return manager if named <= set(manager.all_tasks) else TaskManager(include_path=folders)


def _members(config: dict[str, Any] | None) -> Iterator[str]:
    """The names that a group's file lists."""
    listed = (config or {}).get("task")
    for member in listed if isinstance(listed, list) else ():
        if name := member if isinstance(member, str) else member.get("task", member.get("group")):
            yield str(name)


def _load(manager: Any, name: str, held: Contained) -> list[Item]:
    """What one name or path stands for; a group that has no figures of its own is shown as its parts."""
    if _is_path(name):
        path, origin = Path(name), Path(name).resolve().name
        names = _of_folder(manager, path) if path.is_dir() else [str(path)]
    else:
        names, origin = [name], "lm_eval"
        _check_known(manager, name)
    found: list[Item] = []
    for one in names:
        try:
            loaded = manager.load([one])
        except Exception as error:
            raise _cannot_load(one, error, held) from error
        groups = loaded.get("groups") or {}
        inner = {child for group in groups.values() for child in group.child_names}
        roots = [Item(built, origin) for key, built in {**loaded["tasks"], **groups}.items() if key not in inner]
        while any(_is_bare(item) for item in roots):
            roots = [part for item in roots for part in (item.parts if _is_bare(item) else [item])]
        found += roots
    return found


def _is_bare(item: Item) -> bool:
    return not hasattr(item.built, "task_name") and not item.built.has_aggregation


def _of_folder(manager: Any, folder: Path) -> list[str]:
    """The names of a folder's tasks and groups, but for those that one of its groups has."""
    entries = {
        name: entry.cfg
        for name, entry in manager.task_index.items()
        if entry.yaml_path and entry.yaml_path.resolve().is_relative_to(folder.resolve())
    }
    if not entries:
        why = "no .yaml file in it has a task or a group"
        raise RecipeError(f"the folder {folder} has no task", why, "give another path")
    inner = {name for config in entries.values() for name in _members(config)}
    return [name for name in entries if name not in inner]


def _check_known(manager: Any, name: str) -> None:
    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        why = f"lm_eval {metadata.version('lm_eval')} has none of that name"
        remedy = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them;"
        raise RecipeError(f"unknown task {name}", why, f"{remedy} a task of your own is given by its path")
    if (entry.cfg or {}).get("unsafe_code"):
        raise RecipeError(f"lm_eval's task {name} is not run", UNSAFE, NO_CODE)


def _cannot_load(name: str, error: Exception, held: Contained) -> RecipeError:
    """What is said of a task that lm_eval cannot load."""
    if held.code:
        return _needs_code(name, held)
    why = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if isinstance(error, ImportError):
        remedy = 'install what it needs; lm_eval has extras, such as pip install "lm_eval[ifeval,math]"'
        return RecipeError(f"lm_eval's task {name} needs a package that is not installed", why, remedy)
    if isinstance(error, OSError):
        remedy = "connect to the network, or copy it into Hugging Face's cache (HF_HOME); a file: correct its path"
        return RecipeError(f"the data set of lm_eval's task {name} cannot be had", why, remedy)
    return RecipeError(f"lm_eval's task {name} cannot be loaded", why, "correct it, or leave it out")


def _needs_code(name: str, held: Contained) -> RecipeError:
    why = f"its metric {held.code[0]} is code that the package evaluate downloads and runs"
    return RecipeError(f"lm_eval's task {name} is not run", why, NO_CODE)


def _check_twice(items: Sequence[Item]) -> None:
    names = [task.task_name for item in items for task in item.tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"the task {twice} is asked for twice", "its figures are shown once", "name it once")


def _prepared(task: Any, limit: int | None, held: Contained) -> str:
    """Sets a task up as lm_eval's command does and rehearses it; a digest of all that decides what a model scores.

    Its requests stay with it (`task.instances`).
    """
    import lm_eval
    from lm_eval.models.dummy import DummyLM

    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(f"lm_eval's task {name} is not run", UNSAFE, NO_CODE)
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"lm_eval's task {name} is not run", "it shows pictures or sounds", "leave it out")
    try:
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["few_shot"])
        few = min(limit or REHEARSED, REHEARSED)
        lm_eval.evaluate(lm=DummyLM(), task_dict={"tasks": {name: task}}, limit=few, bootstrap_iters=0)
        task.set_fewshot_seed(seed=SEEDS["few_shot"])  # the rehearsal has drawn examples
        task.build_all_requests(limit=limit)
    except Exception as error:
        raise _cannot_load(name, error, held) from error
    if held.code:
        raise _needs_code(name, held)
    digest = hashlib.sha256(json.dumps(_settings(task), sort_keys=True, default=_told).encode())
    for request in task.instances:
        asked = [request.request_type, request.args, request.doc]
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(task: Any) -> dict[str, Any]:
    """A task's config, without where its file lies."""
    settings: dict[str, Any] = task.config.to_dict(keep_callable=True)
    return {**settings, "metadata": {**(settings.get("metadata") or {}), "config_source": None}}


def _told(value: Any) -> str:
    """A function by the text of the whole file that it stands in: it may call others there."""
    try:
        return f"{Path(inspect.getfile(value)).read_text(encoding='utf-8')} {value.__qualname__}"
    except (TypeError, OSError, AttributeError):
        return type(value).__qualname__
