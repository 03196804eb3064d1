"""Tests of the handler without WebAssembly: `python3 -m unittest`."""

import sys
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "guest-sdk/python"))

from app import handle  # noqa: E402
from oncely import Reject, testing  # noqa: E402


class Greetings(unittest.TestCase):
    def test_greetings_are_counted_by_name(self) -> None:
        with testing.host() as host:
            for name in ("Ada", "Bob", "Ada"):
                host.deliver(handle, {"name": name})
            self.assertEqual(
                [output.json()["times"] for output in host.outputs],
                [1, 1, 2],
            )

    def test_a_body_without_a_name_is_rejected(self) -> None:
        with testing.host() as host:
            with self.assertRaises(Reject) as raised:
                host.deliver(handle, {"nom": "Ada"})
            self.assertEqual(raised.exception.code, "malformed")
            self.assertEqual(host.outputs, [])


if __name__ == "__main__":
    unittest.main()
