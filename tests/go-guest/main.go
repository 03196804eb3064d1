// The behaviours of the conformance suite in Go; tests/guests has them in Rust.
//
// The behaviour is in the header do. Several names, separated by commas, run in sequence. The body
// may hold their options as JSON.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"oncely"
	"oncely/invocation"
	"oncely/outbox"
	"oncely/sql"
	"oncely/state"
)

func init() {
	oncely.Handle(handle)
}

func main() {}

// options are those of all behaviours.
type options struct {
	From        string  `json:"from"`
	To          string  `json:"to"`
	Delta       int64   `json:"delta"`
	N           int     `json:"n"`
	Subject     string  `json:"subject"`
	OrderingKey string  `json:"ordering_key"`
	DelayMs     int64   `json:"delay_ms"`
	Attempt     uint32  `json:"attempt"`
	AfterMs     *int64  `json:"after_ms"`
	Key         string  `json:"key"`
	Expected    *uint64 `json:"expected"`
	Value       string  `json:"value"`
	Select      string  `json:"select"`
	AsText      string  `json:"as_text"`
	Statements  []struct {
		SQL    string `json:"sql"`
		Params []any  `json:"params"`
	} `json:"statements"`
}

var behaviours = map[string]func(oncely.Message, options) error{
	"insert":        insert,
	"defer":         deferred,
	"emit":          emit,
	"echo":          echo,
	"fail_until":    failUntil,
	"reject":        reject,
	"panic":         panics,
	"state_counter": stateCounter,
	"state_cas":     stateCas,
	"sql_values":    sqlValues,
}

func handle(message oncely.Message) error {
	for _, name := range strings.Split(message.Header("do"), ",") {
		given := options{
			From: "a", To: "b", Delta: 1, N: 1, Attempt: 2, Key: "cas", Value: "x",
		}
		// The body of an echo is not JSON.
		_ = json.Unmarshal(message.Body, &given)
		if err := behaviours[strings.TrimSpace(name)](message, given); err != nil {
			return err
		}
	}
	return nil
}

func (o options) subject(otherwise string) string {
	if o.Subject == "" {
		return otherwise
	}
	return o.Subject
}

func insert(message oncely.Message, given options) error {
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return err
	}
	_, err := sql.Execute(
		"insert into effect (event_id, account, delta, attempt_nonce) values ($1, $2, $3, $6), ($1, $4, $5, $6)",
		message.ID, given.From, -given.Delta, given.To, given.Delta, hex.EncodeToString(random),
	)
	if err != nil {
		return err
	}
	for ordinal := range given.N {
		body := map[string]any{"event_id": message.ID, "ordinal": ordinal}
		if err := outbox.SendJSON(given.subject("out.effect"), body); err != nil {
			return err
		}
	}
	return nil
}

func deferred(_ oncely.Message, given options) error {
	for _, statement := range given.Statements {
		if err := sql.Defer(statement.SQL, statement.Params...); err != nil {
			return err
		}
	}
	return nil
}

func emit(message oncely.Message, given options) error {
	_, err := outbox.Send(outbox.Outgoing{
		Subject:     given.subject("out.x"),
		Body:        []byte("0"),
		OrderingKey: given.OrderingKey,
		Delay:       time.Duration(given.DelayMs) * time.Millisecond,
	})
	return err
}

func echo(message oncely.Message, given options) error {
	var headers []oncely.Header
	for _, header := range message.Headers {
		if !strings.HasPrefix(header.Name, "Nats-") && !strings.HasPrefix(header.Name, "Oncely-") {
			headers = append(headers, header)
		}
	}
	_, err := outbox.Send(outbox.Outgoing{Subject: "out.echo", Body: message.Body, Headers: headers})
	return err
}

func failUntil(message oncely.Message, given options) error {
	attempt := invocation.Attempt()
	if attempt >= given.Attempt {
		return nil
	}
	const text = "requested failure of attempt %d"
	if given.AfterMs != nil {
		delay := time.Duration(*given.AfterMs) * time.Millisecond
		return oncely.RetryAfter(delay, "requested-failure", text, attempt)
	}
	return oncely.Retry("requested-failure", text, attempt)
}

func reject(message oncely.Message, given options) error {
	return oncely.Reject("requested-reject", "requested reject")
}

func panics(message oncely.Message, given options) error {
	panic("requested panic")
}

func stateCounter(message oncely.Message, given options) error {
	entry, err := state.Get("counter")
	if err != nil {
		return err
	}
	value := 0
	if entry != nil {
		if value, err = strconv.Atoi(string(entry.Value)); err != nil {
			return err
		}
	}
	value++
	version, err := state.Set("counter", []byte(strconv.Itoa(value)))
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]any{"value": value, "version": version})
	if err != nil {
		return err
	}
	_, err = outbox.Send(outbox.Outgoing{Subject: "out.state", Body: body, OrderingKey: "counter"})
	return err
}

func stateCas(message oncely.Message, given options) error {
	version, err := state.CompareAndSet(given.Key, given.Expected, []byte(given.Value))
	if state.IsVersionMismatch(err) {
		return oncely.Reject("version-mismatch", "%v", err)
	}
	if err != nil {
		return err
	}
	return outbox.SendJSON("out.state", map[string]any{"key": given.Key, "version": version})
}

func sqlValues(message oncely.Message, given options) error {
	row, err := sql.QueryOne(given.Select)
	if err != nil {
		return err
	}
	texts, err := sql.QueryOne(given.AsText, row.Values...)
	if err != nil {
		return err
	}
	body := map[string]any{}
	for i, column := range texts.Columns {
		body[column] = texts.Values[i]
	}
	return outbox.SendJSON("out.values", body)
}
