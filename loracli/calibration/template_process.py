"""A chat template is a program of strangers: it runs in a process of its own, with limits of time, memory and output.

One process serves this one as long as it lives, and is started when the first template is rendered. It takes and
answers JSON on lines, and ends with its input. Within a process nothing stops a loop in C, as of `10 ** 10 ** 10`;
from outside the system does, whichever thread waits.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

_MEMORY = 2 << 30  # bytes of address space
_MAX_TEXT = 64 << 20  # characters of one rendering, whatever the conversation
_MAX_OWN_TEXT = 256 << 10  # characters that a template may write beside what the conversation is worth
_TIMES = 16  # as many characters of a rendering as the conversation has as JSON: some escape, some write a turn twice
_MAX_REASON = 300  # characters of an error's text, which may be the template's own
_SECONDS = 10.0  # of processor time that a file of records may take beside what its records are worth
_SECONDS_EACH = 0.02  # for each rendering
_SECONDS_A_TURN = 0.001  # for each turn in it; some microseconds are usual
_SURROGATE = re.compile("[\ud800-\udfff]")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


class TemplateRefused(Exception):
    """What the template, or the interpreter of it, objects to."""


class TemplateExceeded(Exception):
    """Which limit was reached; the template is at fault, whatever the record."""


class ChatTemplate:
    """The chat template of a tokenizer, with what time it has left.

    Args:
        tokenizer: with a template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._variables = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
        self._left = _SECONDS

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """Its text; of several, the one that is used with such tools."""
        try:
            return str(self._tokenizer.get_chat_template(None, tools))
        except (ValueError, TypeError) as error:
            raise TemplateRefused(str(error)[:_MAX_REASON]) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """What `apply_chat_template` of the tokenizer gives as text.

        Raises:
            TemplateRefused: if the template fails, in whatever way.
            TemplateExceeded: if it takes more than it may.
        """
        self._left += _SECONDS_EACH + _SECONDS_A_TURN * len(messages)
        request = {
            "chat_template": self.source(tools),
            "conversations": [messages],
            "tools": tools,
            "add_generation_prompt": generation_prompt,
            **self._variables,
        }
        longest = min(_MAX_TEXT, _MAX_OWN_TEXT + _TIMES * len(json.dumps([messages, tools])))
        answer = _SERVER.ask({"seconds": max(self._left, _SECONDS_EACH), "longest": longest, "request": request})
        self._left -= answer.get("seconds", 0.0)
        if "refused" in answer:
            raise TemplateRefused(answer["refused"][:_MAX_REASON])
        if "exceeded" in answer:
            raise TemplateExceeded(answer["exceeded"][:_MAX_REASON])
        return str(answer["text"])


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


class _Server:
    """The process, which is started when it is needed and again where it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer, or what became of it."""
        line = json.dumps(question).encode() + b"\n"
        most = 12 * (question["longest"] + _MAX_REASON) + 200  # bytes of an answer: JSON takes up to 12 a character
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._process, self._owner = _start(), os.getpid()
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline(most)
            except BrokenPipeError:
                answer = b""
            except BaseException:
                process.kill()  # an answer that nobody waits for would be taken for the next one
                self._close()
                raise
            if answer.endswith(b"\n"):
                found: dict[str, Any] = json.loads(answer)
                return found
            if len(answer) == most:
                process.kill()
                self._close()
                return {"exceeded": f"its process answers with more than {most} bytes"}
            self._close()
            return {"exceeded": _end_of(process.returncode)}

    def close(self) -> None:
        """Ends the process, if this one has started it."""
        with self._lock:
            if self._owner == os.getpid():
                self._close()

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    # -I: nothing of the current directory is imported; the path is that of this process.
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import _serve; _serve()"
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _end_of(code: int) -> str:
    if code == -signal.SIGPROF:
        return (
            f"it does not end in the processor time that it may take: {_SECONDS:g} seconds for a file, and "
            f"{_SECONDS_EACH:g} more for each text"
        )
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with the code {code}"


_SERVER = _Server()
atexit.register(_SERVER.close)


def _serve() -> None:
    """The other side: renders until its input ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole terminal; the end of the input says when to end
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # Without a handler the signal ends the process, also in the middle of a computation in C.
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        begun = time.process_time()
        answer: dict[str, Any]
        try:
            text, longest = render_jinja_template(**question["request"])[0][0], question["longest"]
            answer = {"text": text}
            if _SURROGATE.search(text):
                answer = {"refused": "it writes a lone surrogate (\\ud800 to \\udfff), which no tokenizer takes"}
            if len(text) > longest:
                answer = {"exceeded": f"it writes {len(text)} characters; at most {longest} are taken"}
        except MemoryError:
            answer = {"exceeded": f"it takes more than {_MEMORY >> 30} GiB of memory"}
        except Exception as error:
            answer = {"refused": str(error)[:_MAX_REASON] or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer["seconds"] = time.process_time() - begun
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
