"""A user's mistake is one line on stderr and exit status 2; flags and keys reach the config."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_det.about import __version__
from gn_det.cli import COMMANDS, main
from gn_det.cli import parse as parse_flags
from gn_det.cli.flags import config_from_args
from gn_det.config.load import shipped_configs
from gn_det.engine.log import on_screen, run_log
from gn_det.terminal import Screen, guarded, say, wrapped


def parse(words: list[str]) -> object:
    return config_from_args(parse_flags("train", words)[1])


def test_flags_and_overrides_mix_in_any_order() -> None:
    words = ["MODEL.WEIGHTS", "w.pth", "--config", "gn_fpn.yaml", "--train-json", "a.json", "--train-images", "imgs"]
    cfg = parse(words + ["SOLVER.MAX_ITER", "2000", "--output", "out", "SEED", "-1"])
    assert cfg.MODEL.WEIGHTS == "w.pth" and cfg.DATASETS.TRAIN_JSON == "a.json"
    assert cfg.SOLVER.MAX_ITER == 2000 and cfg.OUTPUT_DIR == "out" and cfg.SEED == -1
    assert "SOLVER.MAX_ITER" in cfg.SOLVER.NO_RESCALE


def test_config_file_is_an_alias() -> None:
    assert parse(["--config-file", "gn_c4"]).MODEL.RESNETS.NORM == "GN"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "nothing.yaml"], "neither a file nor a shipped config"),
        (["train", "--config", "gn_fpn", "SOLVER.BASELR", "1"], "did you mean SOLVER.BASE_LR"),
        (["train", "--config", "gn_fpn", "--train-json", "a.json"], "DATASETS.TRAIN_IMAGES is missing"),
        (["predict", "--weights", "w", "--output", "o", "--threshold", "2", "a.jpg"], "give a number from 0 to 1"),
        (["predict", "--weights", "nowhere.pth", "--output", "o", "a.jpg"], "a.jpg: no such image"),
        (["eval", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (
            ["train", "--config", "quickstart", "MODEL.DEVICE", "cpu", "SOLVER.ACCUMULATE", "4", "--num-gpus", "3"],
            "of 12",
        ),
        (
            ["train", "--config", "quickstart", "MODEL.DEVICE", "cpu", "SOLVER.EMA.ENABLED=1"],
            "SOLVER.EMA.ENABLED is 1; it must be True or False",
        ),
        (["train", "--config", "quickstart", "TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC is 'AP'"),
    ],
)
def test_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("gn-det: error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--lr", "1"], ["--num-gpus", "x"], []])
def test_mistaken_flags_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "error: " in err and "train --help" in err


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--config", "quickstart", "--wieghts=w.pth", "SEED", "1"])
    assert "unrecognized arguments: --wieghts=w.pth; did you mean '--weights'?; see" in capsys.readouterr().err


def test_own_training_set_alone_leaves_the_configs_test_set_out() -> None:
    own = ["--config", "gn_fpn", "--train-json", "a.json", "--train-images", "imgs"]
    assert tuple(parse(own).DATASETS.TEST) == ()
    assert parse([*own, "DATASETS.TEST", "b.json@imgs"]).DATASETS.TEST == ("b.json@imgs",)
    assert parse(["--config", "gn_fpn"]).DATASETS.TEST == ("coco_2017_val",)


def test_sigterm_unwinds(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaning up happens, the shell gets 143, and the handler that was there comes back."""
    cleaned = []

    def predict(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("gn_det.prediction.images.predict", predict)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--weights", "w", "--output", str(tmp_path), "a.jpg"])
    assert ended.value.code == 143 and cleaned and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "gn-det: terminated\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """``gn-det help`` is ``gn-det --help``, ``gn-det help COMMAND`` is ``gn-det COMMAND --help``."""
    assert main(["help"]) == 0 and (whole := capsys.readouterr().out)
    assert main(["--help"]) == 0 and capsys.readouterr().out == whole
    with pytest.raises(SystemExit) as ended:
        main(["help", "train"])
    assert ended.value.code == 0 and "usage: gn-det train" in capsys.readouterr().out
    assert main(["help", "trian"]) == 2 and "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_configs_lists_every_experiment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns; each shipped config once, after a line that says which is for whom."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "40.8 / 36.1" in " ".join(out.split()) and "Base-" not in out and "Your own data" in out
    assert [line.split()[0] for line in out.splitlines() if re.match(r"\w+\.yaml", line)] == shipped_configs()


#: A title sequence, a C1 control, a direction mark, a forged line.
EVIL = "a\x1b]0;x\x07b\x9b2Jc\u202ed\nERROR: done\r"
SAFE = "a\\x1b]0;x\\x07b\\x9b2Jc\\u202ed\\nERROR: done\\r"


class Stream(io.StringIO):
    """A stream as sys.stdout may be: its own encoding, and one that cannot be written any more."""

    def __init__(self, encoding: str = "utf-8", error: int = 0, terminal: bool = False) -> None:
        super().__init__()
        self.code, self.error, self.terminal = encoding, error, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.code

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        text.encode(self.code)
        return super().write(text)

    def flush(self) -> None:
        if self.error and self.getvalue():
            raise OSError(self.error, os.strerror(self.error))


def test_every_command_that_echoes_a_word_escapes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        [EVIL],
        ["train", "--config", EVIL],
        ["train", "--config", "quickstart", "--epochs", EVIL],
        ["train", "--config", "quickstart", "--" + EVIL],
        ["predict", "--weights", "w", "--output", "o", EVIL],
        ["weights", EVIL],
        ["convert", EVIL, EVIL + ".pth"],
        ["compare", EVIL],
        ["doctor", EVIL],
    ):
        with contextlib.suppress(SystemExit):
            assert main(words) == 2, words
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "\\x9b2J" in err and not set(err) & set("\x1b\x07\x9b\u202e\r"), (words, err)


def test_screen_of_a_log_file_and_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A carriage return is for a terminal alone; the streams of our own process stay guarded."""
    out, err = Stream(), Stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded(for_good=True) as screen:
        assert screen.write("\x1bab") == 3
        print("\r50%", end="", file=sys.stderr)
    assert err.getvalue() == "\\r50%" and sys.stdout is screen and screen.status(0) == 0


def test_lost_output_keeps_another_failure_and_fails_once() -> None:
    """The status is that of the command where it failed; nothing written to a closed stream is nothing lost."""
    lost = Screen(Stream(error=errno.ENOSPC))
    lost.write("x")
    assert (lost.status(3), lost.status(0)) == (3, 2)
    closed = Screen(None)
    assert closed.write("") == 0 and closed.status(0) == 0
    closed.write("x")
    assert closed.status(0) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stream_that_failed_can_be_closed() -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115
    screen = Screen(stream)
    screen.write("x")
    assert screen.status(3) == 3 and screen.error is not None and screen.error.errno == errno.ENOSPC
    stream.close()  # what is buffered went nowhere


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """What libraries write to descriptor 1 or 2 would go into it."""
    code = (
        "from gn_det.terminal import guarded\nwith guarded(for_good=True): raise SystemExit(open('/dev/null').fileno())"
    )
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], timeout=120, check=False)
    assert done.returncode > 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_screen_escapes_what_a_terminal_obeys_and_what_it_cannot_write(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Stream(encoding), Stream(encoding, terminal=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded():
        say(EVIL + "日本\udcff é")
        print("a\n\tb")
        print("\r50%\x1b", end="", file=sys.stderr)
    told = {"utf-8": "日本\\udcff é", "ascii": "\\u65e5\\u672c\\udcff \\xe9", "cp1252": "\\u65e5\\u672c\\udcff é"}
    assert out.getvalue() == f"{SAFE}{told[encoding]}\na\n\tb\n"
    assert err.getvalue() == "\r50%\\x1b"  # a progress bar goes back to the start of its line
    assert sys.stdout is out and sys.stderr is err


def test_long_values_are_cut_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x" * 10**6]) == 2
    with pytest.raises(SystemExit):
        main(["train", "--config", "quickstart", "--epochs", "y" * 10**6])
    err = capsys.readouterr().err
    assert len(err) < 1000 and "(1000" in err and err.count("\n") == 2


@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 2), (errno.EIO, 2)])
@pytest.mark.parametrize("words", [["configs"], ["--help"], ["train", "--help"], ["--version"]])
def test_lost_output_is_no_success_and_no_trace(
    words: list[str], number: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = Stream()
    monkeypatch.setattr(sys, "stdout", Stream(error=number))
    monkeypatch.setattr(sys, "stderr", err)
    try:
        assert main(words) == status
    except SystemExit as end:
        assert end.code == status
    told = (
        "" if number == errno.EPIPE else f"gn-det: error: standard output cannot be written ({os.strerror(number)})\n"
    )
    assert err.getvalue() == told


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("command", "status"),
    [("configs >&-", 2), ("--help > /dev/full", 2), ("--help | true", 141), ("--help >&- 2>&-", 2)],
)
def test_shell(command: str, status: int) -> None:
    """Through the real process, because Python flushes once more when it ends."""
    words, _, reader = command.partition("|")
    run = f"{sys.executable} -m gn_det {words}; echo $? >&3"
    script = f"exec 3>&1; (sleep 0.2; {run}) |{reader}" if reader else f"exec 3>&1; {run}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"{status}\n"
    assert done.stderr.count("\n") == (1 if status == 2 and "2>&-" not in command else 0)


@pytest.mark.parametrize(
    "words",
    [
        [""],
        ["train", ""],
        ["train", "--config", ""],
        ["train", "--config", "quickstart", "--epochs", "1e999", "--dry-run"],
        ["train", "--config", "quickstart", "--num-gpus", "-1", "--dry-run"],
        ["train", "--config", "quickstart", "--num-gpus", "9" * 5000, "--dry-run"],
        ["predict", "--weights", "w", "--output", "o", "--threshold", "nan", "a.png"],
        ["predict", "--weights", "w", "--output", "o", ""],
        ["predict", "--weights", "w", "--output", "", "a.png"],
        ["predict", "--weights", "w", "--output", "o", "a\0b"],
        ["predict", "--weights", "w", "--output", "o", "a" * 5000],
        ["compare", "small", "--seeds", str(10**30)],
        ["classify", "--arch", "resnet8", "--norm", "BN", "--data", "digits", "--num-gpus", "0", "--dry-run"],
    ],
)
def test_odd_words_are_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "error: " in err and len(err) < 1000
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object, **__: object) -> None:
        np.empty(1 << 62, np.uint8)

    monkeypatch.setattr("gn_det.check.check_sets.check", check)
    assert main(["check", "--train-json", "a", "--train-images", "b"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gn-det: error: out of memory (Unable to allocate 4.00 EiB") and err.count("\n") == 1


def test_log_holds_one_line_for_a_message_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values with line breaks forge no line; a table keeps its lines; nothing controls the terminal."""
    monkeypatch.setattr(logging.getLogger("gn_det"), "handlers", [])
    with run_log(tmp_path):
        log = logging.getLogger("gn_det.test")
        log.info("skipped: %s", EVIL)
        log.info("a table\n| b\x1b |")
        log.info("long: %s", "x" * 10**6)
    lines = [f"skipped: {SAFE}", "a table", "| b\\x1b |"]
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        untimed = re.sub(r"^\[.*?\] ", "", text, flags=re.MULTILINE)
        assert untimed.splitlines()[:3] == lines and len(text) < 11_000 and text.endswith("(1000006 characters)\n")


def test_long_lines_are_broken_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost; long words, tables and progress bars stay whole, and so does output to a file."""
    monkeypatch.setenv("COLUMNS", "60")
    path, table = "/data/" + "x" * 80, "| " + "y" * 70
    text = f"[12:00:00] {'word ' * 30}{path} end\n{table}\n  {'indented ' * 12}\nshort\n"
    screen, file = Stream(terminal=True), Stream()
    Screen(screen).write(text)
    Screen(file).write(text)
    lines = screen.getvalue().splitlines()
    assert file.getvalue() == text and screen.getvalue().split() == text.split()
    assert [line for line in lines if len(line) > 60] == [f"  {path}", table] and lines[-1] == "short"
    assert wrapped("  a " + "b " * 40, 60).splitlines()[1].startswith("    b")
    bar = Stream(terminal=True)
    Screen(bar, "\n\t\r").write("\r" + "z" * 90)
    assert bar.getvalue() == "\r" + "z" * 90


def test_screen_shows_the_short_form_unless_verbose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """log.txt has the long form in any case, with the date."""
    monkeypatch.setattr(logging.getLogger("gn_det"), "handlers", [])
    for verbose in ("0", "1"):
        monkeypatch.setenv("GN_DET_VERBOSE", verbose)
        (tmp_path / verbose).mkdir()
        with run_log(tmp_path / verbose):
            logging.getLogger("gn_det.test").info("a table\n  of %d rows", 2, extra=on_screen("2 rows"))
        shown = re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", capsys.readouterr().out)
        assert shown == ("a table\n  of 2 rows\n" if verbose == "1" else "2 rows\n")
        written = (tmp_path / verbose / "log.txt").read_text()
        assert re.fullmatch(r"\[\d\d/\d\d \d\d:\d\d:\d\d\] a table\n  of 2 rows\n", written)


def test_quickstart_continues_an_interrupted_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An interrupted run says "Rerun with --resume", also that of quickstart; without the flag it starts again."""
    calls: list[dict[str, Any]] = []

    def train(cfg: Any, **keywords: Any) -> None:
        calls.append(keywords)

    monkeypatch.setattr("gn_det.engine.run.train", train)
    for words in (["--resume"], []):
        assert main(["quickstart", "--output", str(tmp_path), *words]) == 2  # it has written no model
    assert [(call["resume"], call["overwrite"]) for call in calls] == [(True, False), (False, True)]
