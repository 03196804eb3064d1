"""Verifies a receipt by its description in docs/receipts.md, with the standard library alone.

verify.py FILE [HASH]: exit code 0 if the receipt is valid and ends with the checkpoint of HASH, 9 if
it is valid and no hash was given, 7 if it is not valid.
"""
import hashlib, json, sys


def sha256(purpose, *parts):
    return hashlib.sha256(bytes([purpose]) + b"".join(parts)).digest()


def canonical(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def root(leaf, index, size, path):
    assert 0 <= index < size
    node, last, digest = index, size - 1, leaf
    for beside in path:
        assert last > 0
        if node % 2 == 1 or node == last:
            digest = sha256(1, beside, digest)
            while node % 2 == 0 and node != 0:
                node, last = node // 2, last // 2
        else:
            digest = sha256(1, digest, beside)
        node, last = node // 2, last // 2
    assert last == 0
    return digest.hex()


def check(proof, checkpoints):
    assert set(proof) == {"leaf", "checkpoint", "index", "path"}
    (checkpoint,) = [one for one in checkpoints if one["number"] == proof["checkpoint"]]
    path = [bytes.fromhex(beside) for beside in proof["path"]]
    leaf = sha256(0, canonical(proof["leaf"]))
    assert root(leaf, proof["index"], checkpoint["leaves"], path) == checkpoint["root"]
    assert proof["leaf"]["v"] == 1
    return proof["leaf"]


def verify(receipt, anchor):
    assert set(receipt) == {"format", "event", "outputs", "checkpoints"}
    assert receipt["format"] == "oncely-receipt/1"
    checkpoints, before = receipt["checkpoints"], None
    for one in checkpoints:
        assert one["format"] == "oncely-checkpoint/1"
        fields = {key: value for key, value in one.items() if key != "hash"}
        assert sha256(2, canonical(fields)).hex() == one["hash"]
        if before:
            assert one["previous"] == before["hash"] and one["number"] == before["number"] + 1
        before = one
    event = check(receipt["event"], checkpoints)
    assert event["kind"] == "event"
    numbers = {output["number"] for output in event["outputs"] or []}
    for proof in receipt["outputs"]:
        output = check(proof, checkpoints)
        assert output["kind"] == "output" and output["event"] == event["event"]
        assert output["worker"] == event["worker"]
        numbers.remove(output["number"])
    assert anchor is None or checkpoints[-1]["hash"] == anchor


try:
    with open(sys.argv[1], encoding="utf-8") as file:
        verify(json.load(file), sys.argv[2] if len(sys.argv) > 2 else None)
except (AssertionError, KeyError, TypeError, ValueError) as error:
    print(f"not valid: {error!r}")
    sys.exit(7)
sys.exit(0 if len(sys.argv) > 2 else 9)
