"""Finds the YAML of the `accelerate launch` process that started this worker.

accelerate accepts any key inside `parallelism_config`, but passes neither our keys nor the file's path on to its
workers. So the worker walks up its ancestors (with psutil, which accelerate needs anyway) to the nearest `accelerate
launch` process, and parses that process's command line with accelerate's own parser. A relative `--config_file` is
relative to *that* process's directory. Without one, the file is accelerate's default in *that* process's HF_HOME.

    in:   the process table, through psutil
    out:  LauncherYaml: found (path and content) | launcher found, but it read no file | no launcher found

The three answers mean different things. A file without our keys turns expert parallelism off, as asked. No launcher at
all may be a file that we failed to see, so config.py warns. A launcher's file that we cannot read is a ValueError,
never a silent "off".

`launch_command` finds, among the same ancestors, the words that start the script again.

This module does not know our keys, and writes nothing: not the environment, not accelerate's state.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARALLELISM_PREFIX = "parallelism_config_"  # accelerate reads only keys of parallelism_config that carry it


@dataclass(frozen=True)
class LauncherYaml:
    """The launcher's config file.

    Attributes:
        status: "found" (path and content hold the file), "no_file" (an accelerate launcher started us but read no
            config file; path is the default file that it did not read), or "no_launcher".
        content: the parsed file, {} unless found. Interpolations such as ${oc.env:NAME} are still text.
        repeated: keys that the file gives twice in one place, as paths ("parallelism_config.moe_ep_degree"). The
            content has the last one, as in accelerate.
    """

    status: Literal["found", "no_file", "no_launcher"]
    path: str | None = None
    content: dict[str, Any] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()


@functools.cache
def find_launcher_yaml() -> LauncherYaml:
    """The YAML (or JSON) of the nearest `accelerate launch` above this process; read once per process.

    Not a collective: each rank looks for itself, and ranks on different machines may see different files.

    Raises:
        ValueError: the launcher's file cannot be read, or is not a mapping.
    """
    return find_in(_ancestors())


def find_in(ancestors: Iterable[Any]) -> LauncherYaml:
    """find_launcher_yaml() over given psutil.Process-like objects, nearest first.

    Skips an ancestor that has ended or belongs to another user: our own launcher is readable.
    """
    import psutil

    for process in ancestors:
        try:
            arguments = launch_arguments(process.cmdline())
        except (psutil.Error, OSError):
            continue
        if arguments is not None:
            return _yaml_of(process, arguments)
    return LauncherYaml("no_launcher")


def launch_arguments(argv: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a process's argv, or None if this process is not the launcher.

    Recognises `accelerate launch`, `accelerate-launch`, `python -m accelerate.commands.launch`,
    `python -m accelerate.commands.accelerate_cli launch` and the files of those modules, after any interpreter flags
    or wrapper (a debugger, timeout, srun). Words after another Python script, or after -c, are that script's own.
    """
    for i, word in enumerate(argv):
        path, after = word.replace("\\", "/"), argv[i + 1 :]
        name = path.rsplit("/", 1)[-1].removesuffix(".exe").removesuffix("-script.py")
        module = path.removesuffix(".py").replace("/", ".")  # of `-m a.b` and of `/…/a/b.py` alike
        if name == "accelerate-launch" or module.endswith("accelerate.commands.launch"):
            return after
        if name == "accelerate" or module.endswith("accelerate.commands.accelerate_cli"):
            if after[:1] == ["launch"]:
                return after[1:]
        if word == "-c" or name.endswith(".py"):
            return None
    return None


def launch_command() -> list[str]:
    """The words that started this script: its launcher's, if an ancestor was given the script and its arguments."""
    return command_in(_ancestors(), sys.argv)


def command_in(ancestors: Iterable[Any], argv: list[str]) -> list[str]:
    """launch_command() over given psutil.Process-like objects, nearest first, for a script called with `argv`."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for process in ancestors:
            words = process.cmdline()
            if len(words) > len(argv) and words[-len(argv) :] == argv:
                return words
    return [sys.executable, *argv]


def default_config_file(environ: Mapping[str, str]) -> str:
    """accelerate's default config file as seen with `environ` (a test holds it to accelerate's constant).

    It is not accelerate's constant, which freezes *this* process's HF_HOME: a training script often sets HF_HOME on its
    first line, after the launcher has read its file.
    """
    cache = environ.get("HF_HOME", os.path.join(environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return os.path.join(os.path.expanduser(cache), "accelerate", "default_config.yaml")


def accelerate_parallelism_keys() -> frozenset[str]:
    """The keys of parallelism_config that accelerate itself reads, with their prefix, from its parser."""
    return frozenset(name for name in _launcher_arguments() if name.startswith(PARALLELISM_PREFIX))


@functools.cache
def accelerate_keys() -> frozenset[str]:
    """Every key of its file that accelerate reads, at the top level or in a section."""
    from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig

    return _launcher_arguments().union(ClusterConfig.__dataclass_fields__, SageMakerConfig.__dataclass_fields__)


@functools.cache
def _launcher_arguments() -> frozenset[str]:
    return frozenset(action.dest for action in _launch_parser()._actions)


def _launch_parser() -> Any:
    # imported here: it pulls in torch and much of accelerate, for a process that has a launcher anyway
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def _ancestors() -> Iterator[Any]:
    """This process's parent, its parent, and so on, up to the first that has ended or may not be read."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process().parent()
        while process is not None:
            yield process
            process = process.parent()


def _yaml_of(process: Any, arguments: list[str]) -> LauncherYaml:
    """The file that the launcher `process`, called with `arguments`, reads its defaults from."""
    import psutil

    given, cpu = _parse(arguments)
    try:
        environ = process.environ()
    except (psutil.Error, OSError):
        environ = os.environ
    path = default_config_file(environ) if given is None else given
    if not os.path.isabs(path):
        try:
            path = os.path.normpath(os.path.join(process.cwd(), path))
        except (psutil.Error, OSError) as error:
            raise ValueError(
                f"`accelerate launch` (process {process.pid}) reads {path}, relative to a directory that its "
                f"worker cannot look up ({error}). Give --config_file an absolute path."
            ) from error
    if given is None and (cpu or not os.path.isfile(path)):
        # under --cpu accelerate does not read its default file (commands/launch.py, _validate_launch_command)
        return LauncherYaml("no_file", path=path)
    return read_config_file(path)


def read_config_file(path: str) -> LauncherYaml:
    """A config file of accelerate, as its launcher reads it. Raises ValueError if it cannot be read."""
    content, repeated = _load(path)
    return LauncherYaml("found", path=path, content=content, repeated=repeated)


def _parse(arguments: list[str]) -> tuple[str | None, bool]:
    """(--config_file, --cpu), read by accelerate's own parser, which tells the script's words from its own."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, _ = _launch_parser().parse_known_args(arguments)
    except SystemExit as error:  # argparse refuses by exiting
        raise ValueError(
            f"This worker's accelerate does not understand the command line of its launcher, "
            f"`accelerate launch {' '.join(arguments)}`: {complaint.getvalue().strip()}\n"
            f"Start the launcher and the workers with one version of accelerate."
        ) from error
    return parsed.config_file, bool(parsed.cpu)


def _load(path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The file's content, read as accelerate reads it (JSON by its name, else YAML), and the keys given twice."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        pairs = _json_pairs(text) if path.endswith(".json") else _yaml_pairs(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}, the config file of `accelerate launch`, cannot be read by its worker: {error}. "
            f"Keep the file in place and readable while workers start."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}, the config file of `accelerate launch`, holds a {type(content).__name__}; "
            f"expected a mapping of accelerate's keys, such as `distributed_type: FSDP`."
        )
    return content, tuple(_repeated(pairs))


class _Pairs(list[tuple[str, Any]]):
    """A mapping as written: (key, value) pairs; keys may repeat."""


def _json_pairs(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_Pairs)


def _yaml_pairs(text: str) -> Any:
    """The file's keys and its sections' keys, without deeper ones."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return _pairs_of(root, lambda section: _pairs_of(section, lambda _: None))


def _pairs_of(node: Any, inside: Callable[[Any], Any]) -> Any:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return None
    # not "<<", which merges another mapping in and may repeat
    return _Pairs((str(key.value), inside(value)) for key, value in node.value if key.value != "<<")


def _repeated(pairs: Any) -> Iterator[str]:
    """The paths of keys that occur twice at the top level or inside a section."""
    places = [("", pairs), *((f"{key}.", value) for key, value in pairs)]
    for place, inside in places:
        counted = Counter(key for key, _ in inside) if isinstance(inside, _Pairs) else {}
        yield from (place + key for key, times in counted.items() if times > 1)
