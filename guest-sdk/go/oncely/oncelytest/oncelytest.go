// Package oncelytest is a host for tests without WebAssembly.
//
//	func TestAnOrderIsAccepted(t *testing.T) {
//		host := oncelytest.New(t)
//		if err := host.Deliver(`{"id": "o1", "cents": 500}`); err != nil {
//			t.Fatal(err)
//		}
//		if host.Outputs[0].Subject != "orders.accepted" {
//			t.Error(host.Outputs)
//		}
//	}
//
// State, outputs and the cache are in memory. SQL runs in a database of the test, with any driver
// of database/sql that knows placeholders such as $1. Without one, Host.SQL returns the results.
// The rules of the host on statements, subjects and limits do not apply here. oncely dev has them.
package oncelytest

import (
	"database/sql"
	"fmt"
	"maps"
	"testing"
	"time"

	"oncely"
	"oncely/internal/backend"
)

// Output is a message that the handler sent.
type Output = backend.Outgoing

// Rows are the rows of a result.
type Rows = backend.Rows

// Statement is a statement that the handler ran.
type Statement struct {
	Text   string
	Params []any
}

// Host is a host for tests. Its fields may be read and set between deliveries.
type Host struct {
	// The database, or nil.
	Database *sql.DB
	// The result of a statement, when there is no database. By default a statement changes one row
	// and returns none.
	SQL func(statement Statement) (rows Rows, changed uint64, err error)
	// The statements of deliveries that took effect.
	Statements []Statement
	// The messages that were sent by deliveries that took effect, with their ids.
	Outputs []Output
	State   map[string]backend.Entry
	Cache   map[string][]byte
	Config  map[string]string
	Attempt uint32
	Now     time.Time

	message     oncely.Message
	tx          *sql.Tx
	statements  []Statement
	sent        []Output
	doomed      error
	lastVersion uint64
}

// New makes a host, until the end of the test.
func New(t testing.TB) *Host {
	host := &Host{
		State:   map[string]backend.Entry{},
		Cache:   map[string][]byte{},
		Config:  map[string]string{},
		Attempt: 1,
		Now:     time.Now().UTC(),
	}
	before := backend.Current
	backend.Current = backendOf{host}
	t.Cleanup(func() { backend.Current = before })
	return host
}

// Deliver delivers a message with this body. An error rolls the effects back and is returned.
func (h *Host) Deliver(body string) error {
	return h.DeliverMessage(oncely.Message{ID: "event-1", Subject: "test", Body: []byte(body)})
}

// DeliverMessage delivers a message. An error rolls the effects back and is returned.
func (h *Host) DeliverMessage(message oncely.Message) (err error) {
	h.message, h.statements, h.sent, h.doomed = message, nil, nil, nil
	state, cache, version := maps.Clone(h.State), maps.Clone(h.Cache), h.lastVersion
	if h.Database != nil {
		if h.tx, err = h.Database.Begin(); err != nil {
			return err
		}
	}
	committed := false
	defer func() {
		if !committed {
			h.State, h.Cache, h.lastVersion = state, cache, version
			if h.tx != nil {
				_ = h.tx.Rollback()
			}
		}
		h.tx = nil
	}()

	if err = oncely.Deliver(message); err == nil {
		err = h.doomed
	}
	if err != nil {
		return err
	}
	if h.tx != nil {
		if err = h.tx.Commit(); err != nil {
			return err
		}
	}
	committed = true
	h.Statements = append(h.Statements, h.statements...)
	h.Outputs = append(h.Outputs, h.sent...)
	return nil
}

// backendOf has the functions behind the packages of the handler.
type backendOf struct{ *Host }

func (h backendOf) Send(message backend.Outgoing) (string, error) {
	if message.ID == "" {
		message.ID = fmt.Sprintf("worker:%s:%d", h.message.ID, len(h.sent))
	}
	h.sent = append(h.sent, message)
	return message.ID, nil
}

func (h backendOf) StateGet(key string) (*backend.Entry, error) {
	if entry, exists := h.State[key]; exists {
		return &entry, nil
	}
	return nil, nil
}

func (h backendOf) StateSet(key string, value []byte) (uint64, error) {
	h.lastVersion++
	h.State[key] = backend.Entry{Value: value, Version: h.lastVersion}
	return h.lastVersion, nil
}

func (h backendOf) StateDelete(key string) (bool, error) {
	_, existed := h.State[key]
	delete(h.State, key)
	return existed, nil
}

func (h backendOf) StateCompareAndSet(key string, expected *uint64, value []byte) (uint64, error) {
	var current *uint64
	if entry, exists := h.State[key]; exists {
		current = &entry.Version
	}
	if (current == nil) != (expected == nil) || current != nil && *current != *expected {
		return 0, &backend.Error{
			Reason:  "version-mismatch",
			Message: "version mismatch",
			Current: current,
		}
	}
	return h.StateSet(key, value)
}

func (h backendOf) run(text string, params []any) (rows Rows, changed uint64, err error) {
	statement := Statement{Text: text, Params: params}
	h.statements = append(h.statements, statement)
	if h.SQL == nil {
		return Rows{}, 1, nil
	}
	return h.SQL(statement)
}

// fail remembers the first failed statement: it dooms the delivery.
func (h backendOf) fail(err error) error {
	if err != nil && h.doomed == nil {
		h.doomed = err
	}
	return err
}

func (h backendOf) Query(statement string, params []any) (Rows, error) {
	if h.tx == nil {
		rows, _, err := h.run(statement, params)
		return rows, h.fail(err)
	}
	found, err := h.tx.Query(statement, params...)
	if err != nil {
		return Rows{}, h.fail(&backend.Error{Reason: "query-failed", Message: err.Error()})
	}
	defer found.Close()
	columns, err := found.Columns()
	if err != nil {
		return Rows{}, h.fail(err)
	}
	rows := Rows{Columns: columns}
	for found.Next() {
		values, places := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			places[i] = &values[i]
		}
		if err := found.Scan(places...); err != nil {
			return Rows{}, h.fail(err)
		}
		rows.Values = append(rows.Values, values)
	}
	return rows, h.fail(found.Err())
}

func (h backendOf) Execute(statement string, params []any) (uint64, error) {
	if h.tx == nil {
		_, changed, err := h.run(statement, params)
		return changed, h.fail(err)
	}
	result, err := h.tx.Exec(statement, params...)
	if err != nil {
		return 0, h.fail(&backend.Error{Reason: "query-failed", Message: err.Error()})
	}
	changed, err := result.RowsAffected()
	return uint64(changed), h.fail(err)
}

func (h backendOf) Defer(statement string, params []any) error {
	_, err := h.Execute(statement, params)
	return err
}

func (h backendOf) Dialect() string { return "sqlite" }

func (h backendOf) CacheGet(key string) ([]byte, bool, error) {
	value, exists := h.Cache[key]
	return value, exists, nil
}

func (h backendOf) CachePut(key string, value []byte, _ time.Duration, _ []string) error {
	h.Cache[key] = value
	return nil
}

func (h backendOf) CacheInvalidate([]string) error {
	clear(h.Cache)
	return nil
}

func (h backendOf) Config(key string) (string, bool) {
	value, exists := h.Host.Config[key]
	return value, exists
}

func (h backendOf) InvocationID() string     { return "worker:" + h.message.ID }
func (h backendOf) Worker() string           { return "worker" }
func (h backendOf) Version() uint32          { return 1 }
func (h backendOf) Attempt() uint32          { return h.Host.Attempt }
func (h backendOf) MaxAttempts() uint32      { return 10 }
func (h backendOf) Now() time.Time           { return h.Host.Now }
func (h backendOf) Remaining() time.Duration { return 10 * time.Second }
func (h backendOf) Traceparent() string      { return h.message.Header("traceparent") }
