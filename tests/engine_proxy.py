"""A Docker engine that goes away for the client under test, and for nobody else."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class EngineProxy:
    """A proxy between a client and the engine's socket, so that the engine can go away for this client alone."""

    def __init__(self, path: Path, target: str) -> None:
        self._target, self._ends, self._is_gone = target, list[socket.socket](), False
        self._listener = socket.create_server(str(path), family=socket.AF_UNIX)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_gone:
                client.close()  # closed instead of refused: the docker library leaks the socket of a refused connection
                continue
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._target)
            self._ends += [client, engine]
            for source, target in ((client, engine), (engine, client)):
                self._threads.append(threading.Thread(target=self._copy, args=(source, target)))
                self._threads[-1].start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        """Close every connection, and every new one at once."""
        self._is_gone = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def start_again(self) -> None:
        """Accept new connections."""
        self._is_gone = False

    def close(self) -> None:
        self.stop()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()
