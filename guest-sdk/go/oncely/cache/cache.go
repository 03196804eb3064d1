// Package cache has values that are cheap to recompute. It is not part of the transaction.
package cache

import (
	"time"

	"oncely/internal/backend"
)

// Get returns the value under a key, and whether there is a valid one.
func Get(key string) ([]byte, bool, error) {
	return backend.Get().CacheGet(key)
}

// Put stores a value after the commit, for at most its time to live.
func Put(key string, value []byte, ttl time.Duration, tags ...string) error {
	return backend.Get().CachePut(key, value, ttl, tags)
}

// Invalidate drops all values of this worker that have one of these tags, on all hosts, after the
// commit.
func Invalidate(tags ...string) error {
	return backend.Get().CacheInvalidate(tags)
}
