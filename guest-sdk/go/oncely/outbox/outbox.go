// Package outbox sends messages that are published after the transaction has committed, never
// before.
package outbox

import (
	"encoding/json"
	"fmt"

	"oncely/internal/backend"
)

// Outgoing is a message to publish.
type Outgoing = backend.Outgoing

// Error is a refused message. The effects of the handler are rolled back, even if it returns nil.
type Error = backend.Error

// Send adds a message to the outbox and returns its id.
func Send(message Outgoing) (string, error) {
	return backend.Get().Send(message)
}

// SendJSON adds a message with a JSON body to the outbox.
func SendJSON(subject string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("the message for %s cannot be written as JSON: %w", subject, err)
	}
	_, err = Send(Outgoing{Subject: subject, Body: text})
	return err
}
