// Package oncely has the handler, its messages and its failures.
//
//	func init() { oncely.HandleJSON(handle) }
//
//	func main() {}
//
//	func handle(order Order, message oncely.Message) error {
//		if order.Cents <= 0 {
//			return oncely.Reject("malformed", "an order needs a positive amount")
//		}
//		_, err := sql.Execute("insert into orders (id, cents) values ($1, $2)", order.ID, order.Cents)
//		if err != nil {
//			return err
//		}
//		return outbox.SendJSON("orders.accepted", Accepted{ID: order.ID})
//	}
//
// The effects of sql, state and outbox belong to one database transaction. Returning nil commits
// them, once. An error rolls all of them back: Reject makes a dead letter at once, Retry,
// RetryAfter and every other error lead to another attempt. So does a panic, in a new instance.
package oncely

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"oncely/internal/backend"
)

// Header is a name with a value.
type Header = backend.Header

// Origin is a position on a stream.
type Origin struct {
	Stream   string
	Sequence uint64
	StoredAt time.Time
}

// Message is one message, as stored on its stream.
type Message struct {
	// The event id, which identifies copies of the same event.
	ID      string
	Subject string
	Body    []byte
	// Names and values, in order. A name may appear more than once.
	Headers []Header
	// Nil when the message did not come from a stream.
	Origin *Origin
}

// Header returns the first value of a header, regardless of case; empty when there is none.
func (m Message) Header(name string) string {
	for _, header := range m.Headers {
		if strings.EqualFold(header.Name, name) {
			return header.Value
		}
	}
	return ""
}

var handler func(Message) error

// Handle makes a function the handler of the component. Call it from init.
func Handle(function func(message Message) error) {
	handler = function
}

// HandleJSON makes a function the handler of the component. Its payload is read from a JSON body. A
// body that does not fit is rejected with the code malformed.
func HandleJSON[T any](function func(payload T, message Message) error) {
	Handle(func(message Message) error {
		var payload T
		if err := json.Unmarshal(message.Body, &payload); err != nil {
			return Reject("malformed", "the body does not fit: %v", err)
		}
		return function(payload, message)
	})
}

// Deliver calls the handler. It is for hosts.
func Deliver(message Message) error {
	if handler == nil {
		panic("there is no handler: call oncely.Handle from init")
	}
	return handler(message)
}

// FailureKind is whether and when to retry a failed message.
type FailureKind int

const (
	// KindRetry retries after a backoff.
	KindRetry FailureKind = iota
	// KindRetryAfter retries, but not before the delay has passed.
	KindRetryAfter
	// KindReject does not retry.
	KindReject
)

// Failure is why a message could not be handled.
type Failure struct {
	Kind FailureKind
	// A short, stable name for this kind of failure, or empty. Dead letters are grouped by it.
	Code string
	// One sentence for the operator who reads the dead letter.
	Message string
	Delay   time.Duration
}

func (f *Failure) Error() string {
	return f.Message
}

// Retry retries after a backoff. After the last attempt the message becomes a dead letter.
func Retry(code, format string, arguments ...any) error {
	return &Failure{Kind: KindRetry, Code: code, Message: fmt.Sprintf(format, arguments...)}
}

// RetryAfter is like Retry, but not before the delay has passed; at most 24 hours.
func RetryAfter(delay time.Duration, code, format string, arguments ...any) error {
	message := fmt.Sprintf(format, arguments...)
	return &Failure{Kind: KindRetryAfter, Code: code, Message: message, Delay: delay}
}

// Reject does not retry: the message becomes a dead letter at once.
func Reject(code, format string, arguments ...any) error {
	return &Failure{Kind: KindReject, Code: code, Message: fmt.Sprintf(format, arguments...)}
}

// AsFailure returns the failure in an error; a retry with its text for every other error.
func AsFailure(err error) *Failure {
	var failure *Failure
	if errors.As(err, &failure) {
		return failure
	}
	return &Failure{Kind: KindRetry, Message: err.Error()}
}
