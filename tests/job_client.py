"""``python -m MODULE ...`` in a process that ``job_server.py`` forks: python -S -E tests/job_client.py SOCKET -m ..."""

import json
import os
import socket
import sys

server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
job = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
socket.send_fds(server, [json.dumps(job).encode()], [1, 2])
answer = server.recv(1)
sys.exit(answer[0] if answer else 137)  # it was killed, or the server was
