// Package backend is the host behind the functions of the other packages: Oncely in a component, a
// test otherwise.
package backend

import (
	"fmt"
	"time"
)

// Backend is a host.
type Backend interface {
	Send(message Outgoing) (string, error)

	StateGet(key string) (*Entry, error)
	StateSet(key string, value []byte) (uint64, error)
	StateDelete(key string) (bool, error)
	StateCompareAndSet(key string, expected *uint64, value []byte) (uint64, error)

	Query(statement string, params []any) (Rows, error)
	Execute(statement string, params []any) (uint64, error)
	Defer(statement string, params []any) error
	Dialect() string

	CacheGet(key string) ([]byte, bool, error)
	CachePut(key string, value []byte, ttl time.Duration, tags []string) error
	CacheInvalidate(tags []string) error

	Config(key string) (string, bool)

	InvocationID() string
	Worker() string
	Version() uint32
	Attempt() uint32
	MaxAttempts() uint32
	Now() time.Time
	Remaining() time.Duration
	Traceparent() string
}

// Current is the host. It is nil outside of a component and of a test.
var Current Backend

// Get returns the host.
func Get() Backend {
	if Current == nil {
		panic("there is no host here: call oncelytest.New first")
	}
	return Current
}

// Header is a name with a value.
type Header struct {
	Name  string
	Value string
}

// Outgoing is a message to publish.
type Outgoing struct {
	// The subject. It must match one of the outputs of the manifest.
	Subject string
	Body    []byte
	// Names that begin with Nats- or Oncely- are reserved.
	Headers []Header
	// {worker}:{event id}:{ordinal} when it is empty.
	ID string
	// Messages with the same key are published in commit order.
	OrderingKey string
	// How long after the commit to publish.
	Delay time.Duration
}

// Entry is a value with its version.
type Entry struct {
	Value []byte
	// It grows with each change of the key.
	Version uint64
}

// Rows are the rows of a result; each is as long as Columns.
type Rows struct {
	Columns []string
	Values  [][]any
}

// Types of SQL that Go has no type for. SQLite returns them as text.
type (
	// Decimal is an exact decimal, such as 12.50.
	Decimal string
	// UUID is a UUID in text form.
	UUID string
	// JSON is JSON text.
	JSON string
	// Date is a date, such as 2026-01-31.
	Date string
	// TimeOfDay is a time of day, such as 13:05:59.25.
	TimeOfDay string
)

// Error is why a function of the host refused its arguments or failed.
type Error struct {
	// The name of the error in wit/worker.wit, such as not-granted or constraint-violation.
	Reason  string
	Message string
	// SQLSTATE on PostgreSQL, the extended result code on SQLite; empty for other errors.
	Code string
	// The violated constraint, where the database names it.
	Constraint string
	// For version-mismatch: the version of the key, nil when it does not exist.
	Current *uint64
}

func (e *Error) Error() string {
	if e.Code == "" {
		return e.Message
	}
	if e.Constraint != "" {
		return fmt.Sprintf("%s (constraint %s, code %s)", e.Message, e.Constraint, e.Code)
	}
	return fmt.Sprintf("%s (code %s)", e.Message, e.Code)
}
