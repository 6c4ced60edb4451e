"""lm-eval's own tasks, asked over files that lie on this machine.

MMLU and C-Eval can be read from the CSV folders that their authors hand out. Only the place of the data changes: prompt,
choices, subjects' names, groups and aggregation are lm-eval's (`lm_eval/tasks/mmlu/default`, `lm_eval/tasks/ceval`), so the
number is lm-eval's number on those files. Nothing here uses the network.
"""

import contextlib
import difflib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from drencoder.data.benchmarks.files import read_questions
from drencoder.data.benchmarks.questions import DEFAULT_SPLIT, EXAMPLE_SPLIT
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import Question
from drencoder.data.prompts_template import LETTERS
from drencoder.errors import DataError

_FEW_SHOT_SEED = 1234  # lm-eval's default, for tasks that draw their worked examples
_CONTINUOUS = "loglikelihood_rolling"


@final
@dataclass(frozen=True)
class _Group:
    """A benchmark of ours in lm-eval: its group, the folder of its YAML files, and what precedes a subject's name."""

    name: str
    folder: str
    prefix: str


_GROUPS = {"mmlu": _Group("mmlu", "mmlu/default", "mmlu_"), "ceval": _Group("ceval-valid", "ceval", "ceval-valid_")}


@final
@dataclass(frozen=True)
class LoadedBenchmark:
    """One task, or one group of tasks, that is ready to be asked.

    `task` is lm-eval's name of the whole, and `tasks` what its `TaskManager.load` returns; `subjects` maps the name of each single task to the subject that a
    table shows; `shots` is the number of worked examples, as a text, since the tasks of a group may differ.
    """

    name: str
    task: str
    provenance: str
    tasks: Any
    subjects: Mapping[str, str]
    shots: str


def unify_names(names: Sequence[str]) -> list[str]:
    """Returns the names without repetition, `ceval-valid` (lm-eval's name) as `ceval`."""
    return list(dict.fromkeys("ceval" if name == "ceval-valid" else name for name in names))


def load_tasks(
    names: Sequence[str], places: Mapping[str, str], *, subjects: Sequence[str] = (), shots: int | None = None
) -> list[LoadedBenchmark]:
    """Loads tasks of lm-eval and their data.

    Args:
      names: "mmlu", "ceval" or any task or group of lm-eval.
      places: name -> where its data lies. For "mmlu" and "ceval" the folder of the original CSV files; for a single other
        task a folder that the datasets library reads and that has the columns of the task. A task without a place takes
        its data from the datasets library's cache.
      subjects: only these subjects of "mmlu" and "ceval"; empty = all that are there.
      shots: worked examples before each question; None = as the task says.

    Raises:
      DataError: lm-eval is not installed, a name is not known, or the data is not on this machine or cannot be read.
    """
    _require_lm_eval()
    if unused := sorted(set(places) - set(names)):
        raise DataError(f"--from {unused[0]}={places[unused[0]]} belongs to no task that is asked: add it to --tasks.")
    chosen = {name: _subjects_of(name, names, subjects) for name in names}
    loaded = []
    with quiet_lm_eval():
        for name in names:
            if name in _GROUPS:
                tasks = _load_group(name, places.get(name), chosen[name], shots or 0)
            else:
                tasks = _load_other(name, places.get(name))
            provenance = places.get(name, "the datasets library's cache")
            loaded.append(_finish(name, provenance, tasks, shots))
    return loaded


def _require_lm_eval() -> None:
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError:
        raise DataError("drencoder evaluate --tasks needs lm-eval: pip install 'drencoder[eval]'.") from None


def _subjects_of(name: str, names: Sequence[str], subjects: Sequence[str]) -> Sequence[str]:
    """The asked-for subjects that `name` has; each must belong to one of the benchmarks, each benchmark must have one."""
    if not subjects:
        return ()
    known = {one: TAXONOMIES[one].subjects for one in names if one in TAXONOMIES}
    if name not in known:
        raise DataError(f"--subjects belongs to mmlu and ceval: ask for {name} without it.")
    for subject in subjects:
        if not any(subject in some for some in known.values()):
            TAXONOMIES[name].check_subject(subject, "--subjects", sorted(set().union(*known.values())))
    mine = [subject for subject in subjects if subject in known[name]]
    if not mine:
        raise DataError(f"--subjects {','.join(subjects)} has none of {name}: add one, or take {name} out of --tasks.")
    return mine


# --- MMLU and C-Eval ---------------------------------------------------------------------------------


def _load_group(name: str, place: str | None, subjects: Sequence[str], shots: int) -> Any:
    """lm-eval's group with the subjects that are asked, over the files in `place`."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    group = _GROUPS[name]
    folder = Path(str(lm_eval.tasks.__file__)).parent / group.folder
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    parts = None if place is None else _read_parts(name, place, subjects, shots)

    def make_task(task: str, settings: Mapping[str, Any]) -> list[Any]:
        subject = task.removeprefix(group.prefix)
        if parts is None:
            return [] if subjects and subject not in subjects else [ConfigurableTask(config=dict(settings))]
        if subject not in parts:
            return []
        return [ConfigurableTask(config={**settings, "custom_dataset": lambda **_metadata: parts[subject]})]

    with _explain_missing_data(name, place):
        return manager.load(_build(manager.task_index, group.name, make_task))


def _build(index: Mapping[str, Any], name: str, make_task: Callable[[str, Mapping[str, Any]], list[Any]]) -> list[Any]:
    """The task, or the group with all below it, as lm-eval's files describe them; groups that are left empty are left out."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    entry = index[name]
    if entry.kind.name == "TAG":
        return [child for member in sorted(entry.tags) for child in _build(index, member, make_task)]
    settings = {key: value for key, value in entry.cfg.items() if key != "tag"}
    if entry.kind.name != "GROUP":
        return make_task(name, settings)
    children = [child for member in settings["task"] for child in _build(index, member, make_task)]
    if not children:
        return []
    group = Group.from_config(GroupConfig(**settings))
    for child in children:
        group.add(child)
    return [group]


def _read_parts(name: str, place: str, subjects: Sequence[str], shots: int) -> dict[str, dict[str, Any]]:
    """Subject -> split -> its rows, in the columns of the data set that lm-eval's task expects."""
    from datasets import Dataset

    if not Path(place).is_dir():
        raise DataError(f"--from {name}={place}: the folder does not exist: give the one with the original CSV files.")
    taxonomy, split = TAXONOMIES[name], DEFAULT_SPLIT[name]
    asked = read_questions(taxonomy, place, split, subjects)
    examples: Mapping[str, Sequence[Question]] = {}
    if shots:
        examples = read_questions(taxonomy, place, EXAMPLE_SPLIT, list(asked))
    parts = {}
    for subject, questions in asked.items():
        rows = Dataset.from_list([_row(name, question) for question in questions])
        worked = [_row(name, question) for question in examples.get(subject, ())]
        parts[subject] = {split: rows, EXAMPLE_SPLIT: worked}
    return parts


def _row(name: str, question: Question) -> dict[str, Any]:
    if name == "mmlu":
        return {"question": question.question, "choices": list(question.choices), "answer": question.answer}
    options = dict(zip(LETTERS, question.choices, strict=True))
    return {"question": question.question, **options, "answer": LETTERS[question.answer]}


# --- every other task --------------------------------------------------------------------------------


@functools.cache
def _all_tasks() -> Any:
    """lm-eval's index of all its tasks, which takes some ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_other(name: str, place: str | None) -> Any:
    manager = _all_tasks()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them."
        raise DataError(f"--tasks: {name!r} is not a task of lm-eval: {hint}")
    with _explain_missing_data(name, place):
        if place is None:
            return manager.load([name])
        return _load_from_folder(manager, name, place)


def _load_from_folder(manager: Any, name: str, place: str) -> Any:
    """One task of lm-eval whose data set is a local folder: a YAML file that includes lm-eval's own says so."""
    import datasets
    import yaml

    entry = manager.task_index[name]
    if entry.kind.name != "TASK":
        raise DataError(f"--from {name}={place}: {name} is not a single task: ask for each of its tasks by name.")
    if not Path(place).is_dir():
        raise DataError(f"--from {name}={place}: the folder does not exist: give the folder of the task's data set.")
    configuration = entry.cfg.get("dataset_name")
    with tempfile.TemporaryDirectory() as folder:
        if configuration not in datasets.get_dataset_config_names(place):
            configuration = None
        settings = {
            "include": str(entry.yaml_path),
            "task": name,
            "dataset_path": str(Path(place).resolve()),
            "dataset_name": configuration,
            # The library would keep a copy of the texts in the user's cache; this one goes with the folder.
            "dataset_kwargs": {"cache_dir": folder, "keep_in_memory": True},
        }
        path = Path(folder) / "task.yaml"
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        return manager.load([str(path)])


@contextlib.contextmanager
def _explain_missing_data(name: str, place: str | None) -> Iterator[None]:
    """One sentence for all that lm-eval and the datasets library raise; their messages may quote a row, so none is shown."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"task {name} needs the package {error.name!r}, which is not here: install it.") from None
    except Exception as error:
        if place is not None:
            raise DataError(
                f"--from {name}={place}: lm-eval cannot read this folder as {name} ({type(error).__name__}): it must hold "
                "the splits and columns of the task's data set."
            ) from None
        raise DataError(
            f"the data of task {name} is not on this machine ({type(error).__name__}), and drencoder evaluate downloads "
            f"nothing: give its folder with --from {name}=FOLDER, or fill the datasets library's cache first."
        ) from None


# --- what all tasks need -----------------------------------------------------------------------------


def _finish(name: str, provenance: str, tasks: Any, shots: int | None) -> LoadedBenchmark:
    """Sets the number of worked examples as lm-eval's own `simple_evaluate` does: a task that fixes 0 keeps it."""
    group = _GROUPS.get(name, _Group(name, "", ""))
    subjects = {}
    for task_name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == _CONTINUOUS:
            raise DataError(
                f"task {task_name} measures texts as a whole, not answers: choose a task with right answers."
            )
        default = task.get_config("num_fewshot")
        if default is None or (shots is not None and default != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        count = task.get_config("num_fewshot")
        available = len(task.fewshot_docs() or ()) if count else 0
        if count > available:
            raise DataError(
                f"{provenance}: {task_name} has {available} worked examples, fewer than --shots {count}: lower it."
            )
        subjects[task_name] = task_name.removeprefix(group.prefix)
    counts = sorted({task.get_config("num_fewshot") for task in tasks["tasks"].values()})
    return LoadedBenchmark(name, group.name, provenance, tasks, subjects, " or ".join(map(str, counts)))


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keeps lm-eval and the datasets library off the network and off the screen: no log, no bars, no warnings, no prints."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [(switch, switch.HF_HUB_OFFLINE) for switch in switches]
    logged = logging.root.manager.disable
    nowhere = io.StringIO()
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)
        for switch, value in before:
            switch.HF_HUB_OFFLINE = value
