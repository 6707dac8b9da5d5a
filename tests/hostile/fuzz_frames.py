"""The frame parser under a coverage-guided fuzzer: python -m tests.hostile.fuzz_frames -atheris_runs=100000

Starts from the stored frames. Every argument is libFuzzer's; -atheris_runs=N ends after N inputs. The exit
status is 0 when nothing but requests and coded errors came of any input.
"""

import atexit
import signal
import sys
import tempfile
from pathlib import Path


def _run() -> None:
    import atheris

    with atheris.instrument_imports(include=["ckptd_client.wire", "ckptd.intake", "json"]):
        from tests.hostile import frame_noise

    def one(data: bytes) -> None:
        if data[:1] == b"\x01":
            frame_noise.swallow_descriptor(data[1:])
        elif data[:1] == b"\x02":
            frame_noise.swallow_reply(data[1:])
        else:
            frame_noise.swallow(data)

    with tempfile.TemporaryDirectory(prefix="ck") as corpus:
        seeds = [*frame_noise.good(), b"\x01" + frame_noise.DESCRIPTOR]
        for number, seed in enumerate(seeds):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], corpus, "-timeout=120", "-rss_limit_mb=1024", *sys.argv[1:]], one)
        # libFuzzer's timer for inputs that hang goes on while Python ends, which gives SIGALRM its deadly default back.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
        atheris.Fuzz()


if __name__ == "__main__":
    _run()
