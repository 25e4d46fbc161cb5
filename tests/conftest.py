"""What every test stands on."""

from __future__ import annotations

import signal

# A shell starts background jobs (nohup, CI runners) with interrupts ignored, and programs started by tests inherit
# that: those that are to be interrupted would wait for ever. A handler is not inherited, the default is.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Scripts that tests start as programs: they read what they are given when they are imported.
collect_ignore = ["job_client.py", "lossy_pbs.py"]
