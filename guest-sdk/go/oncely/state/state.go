// Package state has keyed values of this worker, in the same transaction.
package state

import (
	"errors"

	"oncely/internal/backend"
)

// Entry is a value with its version.
type Entry = backend.Entry

// Error is a refused operation.
type Error = backend.Error

// Get returns the value under a key; nil when the key does not exist.
func Get(key string) (*Entry, error) {
	return backend.Get().StateGet(key)
}

// Set sets a value and returns its new version.
func Set(key string, value []byte) (uint64, error) {
	return backend.Get().StateSet(key, value)
}

// Delete deletes a key. It returns false when the key did not exist.
func Delete(key string) (bool, error) {
	return backend.Get().StateDelete(key)
}

// CompareAndSet sets a value only if the key still has the expected version. Nil expects a missing
// key.
func CompareAndSet(key string, expected *uint64, value []byte) (uint64, error) {
	return backend.Get().StateCompareAndSet(key, expected, value)
}

// IsVersionMismatch returns whether CompareAndSet found another version.
func IsVersionMismatch(err error) bool {
	var refused *Error
	return errors.As(err, &refused) && refused.Reason == "version-mismatch"
}
