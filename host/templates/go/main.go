// Accepts orders: stores each one, and sends a message about it.
package main

import (
	"log/slog"

	"oncely"
	"oncely/outbox"
	"oncely/sql"
)

// Order is the body of a message on {{name}}.new.
type Order struct {
	ID    string `json:"id"`
	Cents int64  `json:"cents"`
}

// Accepted is the body of a message on {{name}}.accepted.
type Accepted struct {
	ID string `json:"id"`
}

func init() {
	oncely.HandleJSON(handle)
}

func main() {}

// The effects of handle are committed together, once, when it returns nil.
func handle(order Order, message oncely.Message) error {
	if order.Cents <= 0 {
		return oncely.Reject("malformed", "an order needs a positive amount")
	}
	stored, err := sql.Execute(
		"insert into orders (id, cents) values ($1, $2) on conflict do nothing",
		order.ID, order.Cents)
	if err != nil {
		return err
	}
	if stored == 0 {
		slog.Info("order came in another message before", "id", order.ID)
		return nil
	}
	slog.Info("accepted order", "id", order.ID)
	return outbox.SendJSON("{{name}}.accepted", Accepted{ID: order.ID})
}
