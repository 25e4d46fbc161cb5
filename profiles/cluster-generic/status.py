"""What became of an OpenPBS job: prints running, success or failed, as Snakemake asks for.

python profiles/cluster-generic/status.py JOB
"""

import json
import subprocess
import sys
import time

ATTEMPTS, WAIT = 5, 10  # seconds: a scheduler that does not answer for a moment has not lost the job


def state(job: str) -> str:
    for attempt in range(ATTEMPTS):
        asked = subprocess.run(["qstat", "-x", "-f", "-F", "json", job], capture_output=True, text=True)
        if asked.returncode == 0:
            (found,) = json.loads(asked.stdout)["Jobs"].values()
            if found["job_state"] not in ("F", "X"):  # finished: whatever else is still on its way
                return "running"
            return "success" if found.get("Exit_status") == 0 else "failed"
        if "Unknown Job" in asked.stderr:  # its record is gone, so it is not running
            return "failed"
        if attempt + 1 < ATTEMPTS:
            time.sleep(WAIT)
    return "running"  # nobody knows: ask again later


print(state(sys.argv[1]))
