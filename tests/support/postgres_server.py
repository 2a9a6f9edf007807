"""A real PostgreSQL server on loopback, in a folder of its own, that can be stopped, killed and started again.

    with PostgresServer() as server:
        ... server.url ...
        server.stop(); ...; server.start()

It refuses to run as root; then it runs as an unprivileged user, in a temporary folder that is that user's. Only the
server that was started here is stopped.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

USER, PASSWORD, DATABASE = "forge", "s3cret:word", "studies"


def missing() -> str:
    """Why no server can be started here; empty where one can."""
    if _programs() is None:
        return "no PostgreSQL server here: initdb is neither on PATH nor in /usr/lib/postgresql/*/bin"
    if os.getuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody' here"
    return ""


class PostgresServer:
    """The server; `url` stays the same over restarts."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://{USER}:s3cret%3Aword@127.0.0.1:{self.port}/{DATABASE}"
        # Not below pytest's own folder, which only its owner may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="forge-postgres-"))
        self._data = self.folder / "data"

    def __enter__(self) -> "PostgresServer":
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if os.getuid() == 0 and (user := _unprivileged()):
            for path in (self.folder, password):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._run("initdb", "-D", self._data, "-U", USER, "--pwfile", password, "-A", "scram-sha-256", "-E", "UTF8")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, DATABASE)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", self.folder / "log", "-w", "-t", "60", "-o", options, "start")

    def stop(self, how: str = "fast") -> None:
        """Stop it: "fast" ends all connections, "immediate" is a crash."""
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "60", "-m", how, "stop")

    def kill(self) -> None:
        """Kill it with SIGKILL, and what it has started with it."""
        pid = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)

    def _run(self, program: str, *arguments: object) -> None:
        programs = _programs()
        assert programs is not None
        done = subprocess.run(
            [str(programs / program), *map(str, arguments)],
            cwd=self.folder,
            env={"PATH": os.defpath, "PGPASSWORD": PASSWORD, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be the server's as well, and never end
            stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            preexec_fn=_demote(),
            check=False,
        )
        if done.returncode != 0:
            log = self.folder / "log"
            said = (done.stderr or b"").decode(errors="replace")
            said += log.read_text(errors="replace")[-4000:] if log.exists() else ""
            raise RuntimeError(f"{program} ended with {done.returncode}: {said}")


def _demote() -> Callable[[], None] | None:
    user = _unprivileged() if os.getuid() == 0 else None
    if user is None:
        return None

    def demote() -> None:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    return demote


def _unprivileged() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _programs() -> Path | None:
    # Debian keeps the server's programs off PATH, in a folder for each version.
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None
