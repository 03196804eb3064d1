package main

import (
	"testing"

	"oncely"
	"oncely/oncelytest"
)

func TestAnOrderIsStoredAndAnnounced(t *testing.T) {
	host := oncelytest.New(t)
	if err := host.Deliver(`{"id": "o1", "cents": 500}`); err != nil {
		t.Fatal(err)
	}
	if len(host.Statements) != 1 || host.Statements[0].Params[0] != "o1" {
		t.Error(host.Statements)
	}
	output := host.Outputs[0]
	if output.Subject != "{{name}}.accepted" || string(output.Body) != `{"id":"o1"}` {
		t.Error(output)
	}
}

func TestAnOrderWithoutAnAmountIsRejected(t *testing.T) {
	host := oncelytest.New(t)
	failure := oncely.AsFailure(host.Deliver(`{"id": "o1", "cents": 0}`))
	if failure.Kind != oncely.KindReject || failure.Code != "malformed" {
		t.Error(failure)
	}
	if len(host.Outputs) != 0 {
		t.Error(host.Outputs)
	}
}
