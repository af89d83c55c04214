"""Puts the requests of a recording to a server again and stores its answers.

  python conformance/backends/server/testdata/record.py http://127.0.0.1:8080 RECORDING.json

The file has a list "exchanges" of objects with "method", "path" and "request"; each
gets "status", "type" and "answer". Standard library only.
"""

import json
import sys
import urllib.error
import urllib.request


def ask(url, exchange):
    body = json.dumps(exchange["request"]).encode() if "request" in exchange else None
    request = urllib.request.Request(url + exchange["path"], body, {"Content-Type": "application/json"}, method=exchange["method"])
    try:
        answer = urllib.request.urlopen(request, timeout=600)
    except urllib.error.HTTPError as refusal:
        answer = refusal
    with answer:
        exchange["status"] = answer.status
        exchange["type"] = answer.headers["Content-Type"]
        text = answer.read().decode()
        exchange["answer"] = json.loads(text) if "json" in exchange["type"] else text


def main(url, path):
    with open(path) as file:
        recording = json.load(file)
    for exchange in recording["exchanges"]:
        ask(url, exchange)
    with open(path, "w") as file:
        json.dump(recording, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
