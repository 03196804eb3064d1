"""Tests of the handler without WebAssembly, on SQLite in memory: `python3 -m unittest`."""

import unittest

from app import handle
from oncely import Reject, testing


class Orders(unittest.TestCase):
    def test_an_order_is_stored_and_announced(self) -> None:
        with testing.host(migrations="migrations") as host:
            host.deliver(handle, {"id": "o1", "cents": 500})
            self.assertEqual(host.rows("select id, cents from orders"), [{"id": "o1", "cents": 500}])
            self.assertEqual(host.outputs[0].subject, "{{name}}.accepted")
            self.assertEqual(host.outputs[0].json(), {"id": "o1"})

    def test_an_order_without_an_amount_is_rejected(self) -> None:
        with testing.host(migrations="migrations") as host:
            with self.assertRaises(Reject) as raised:
                host.deliver(handle, {"id": "o1", "cents": 0})
            self.assertEqual(raised.exception.code, "malformed")
            self.assertEqual(host.outputs, [])


if __name__ == "__main__":
    unittest.main()
