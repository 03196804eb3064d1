// Package invocation describes the current delivery.
package invocation

import (
	"time"

	"oncely/internal/backend"
)

// ID is the same for every attempt at this message. Pass it to other systems as an idempotency key.
func ID() string { return backend.Get().InvocationID() }

// Worker is the name of the worker.
func Worker() string { return backend.Get().Worker() }

// Version is the version of the running deployment.
func Version() uint32 { return backend.Get().Version() }

// Attempt is the number of this attempt, from 1.
func Attempt() uint32 { return backend.Get().Attempt() }

// MaxAttempts is the number of attempts after which the message becomes a dead letter.
func MaxAttempts() uint32 { return backend.Get().MaxAttempts() }

// Now is the time at which this attempt began, in UTC.
func Now() time.Time { return backend.Get().Now() }

// Remaining is the time that the handler has left.
func Remaining() time.Duration { return backend.Get().Remaining() }

// Traceparent is the W3C trace context of the message; empty when it has none.
func Traceparent() string { return backend.Get().Traceparent() }
