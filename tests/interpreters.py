"""Code in a fresh interpreter: with a cache of its own, and without the package where that is the point."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


# Makes any import of the package fail, also where it is installed.
WITHOUT_PACKAGE = 'import sys\nsys.modules["modeling_mapex"] = None\n'


def start_python(code: str, folder, environment=None, *, package=True, drop_privileges=False) -> subprocess.Popen:
    """Start `code` in `folder`.

    Args:
        environment (`dict`, *optional*): All variables of the process; default those of this one.
        package (`bool`): Whether `modeling_mapex` can be imported.
        drop_privileges (`bool`): Obey the permissions of files even as root.
    """
    command = [sys.executable, "-c", ("" if package else WITHOUT_PACKAGE) + textwrap.dedent(code)]
    if drop_privileges and os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to change that")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = str(Path(__file__).parent)
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_python(code: str, folder, environment=None, **options) -> str:
    """Run `code`, which must succeed; its standard output. Arguments as [`start_python`]."""
    return finish(start_python(code, folder, environment, **options))


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return output
