// Package sql runs statements on the worker's own tables, in the same transaction. Placeholders are
// $1, $2, ...
//
// Parameters are nil, bool, integers, floats, string, []byte, time.Time, Decimal, UUID, JSON, Date
// and TimeOfDay. Columns are bool, int64, float64, string, []byte, time.Time and these types;
// SQLite has fewer of them. An error from the database fails the whole message, even if the handler
// returns nil. For an expected conflict, use a statement that does not fail, such as insert ... on
// conflict do nothing, and check the number of rows.
package sql

import (
	"fmt"

	"oncely/internal/backend"
)

// Types of SQL that Go has no type for. SQLite returns them as string.
type (
	// Decimal is an exact decimal, such as 12.50.
	Decimal = backend.Decimal
	// UUID is a UUID in text form.
	UUID = backend.UUID
	// JSON is JSON text.
	JSON = backend.JSON
	// Date is a date, such as 2026-01-31.
	Date = backend.Date
	// TimeOfDay is a time of day, such as 13:05:59.25.
	TimeOfDay = backend.TimeOfDay
)

// Error is a failed statement.
type Error = backend.Error

// Row is a row of a result.
type Row struct {
	Columns []string
	Values  []any
}

// Query runs a statement and returns its rows.
func Query(statement string, params ...any) ([]Row, error) {
	found, err := backend.Get().Query(statement, params)
	if err != nil {
		return nil, err
	}
	rows := make([]Row, len(found.Values))
	for i, values := range found.Values {
		rows[i] = Row{Columns: found.Columns, Values: values}
	}
	return rows, nil
}

// QueryOne runs a statement and returns its first row, or nil.
func QueryOne(statement string, params ...any) (*Row, error) {
	rows, err := Query(statement, params...)
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	return &rows[0], nil
}

// Execute runs a statement and returns the number of changed rows.
func Execute(statement string, params ...any) (uint64, error) {
	return backend.Get().Execute(statement, params)
}

// Defer runs a statement later, without a result: before the next Query or Execute, and in any case
// before the commit. The deferred statements of many messages reach the database together. An error
// from the database fails the message, and its next statement returns it.
func Defer(statement string, params ...any) error {
	return backend.Get().Defer(statement, params)
}

// Dialect returns postgres or sqlite.
func Dialect() string {
	return backend.Get().Dialect()
}

// Value returns the value of a column; nil for SQL null and for a missing column.
func (r Row) Value(column string) any {
	for i, name := range r.Columns {
		if name == column {
			return r.Values[i]
		}
	}
	return nil
}

// Get returns the value of a column as its type. It is an error when the column is missing, SQL
// null, or of another type.
func Get[T any](row Row, column string) (T, error) {
	value, isType := row.Value(column).(T)
	if !isType {
		return value, fmt.Errorf("the column %s is a %T, not a %T", column, row.Value(column), value)
	}
	return value, nil
}
