// Package config has the [worker.config] table of the manifest.
package config

import "oncely/internal/backend"

// Get returns the value of a key, and whether it is set.
func Get(key string) (string, bool) {
	return backend.Get().Config(key)
}
