package wasm

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// growth is the size of the allocations between two collections of garbage, in bytes.
const growth = 4 << 20

var (
	allocated = []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	collected uint64
)

// The collector calls functions of WASI. A component must not call the host while the host
// allocates memory for a result, and any allocation may start the collector. So it never starts by
// itself.
func init() {
	debug.SetGCPercent(-1)
	runtime.GC()
}

// Collect collects garbage if much memory was allocated since the last time. It runs before each
// message and each call of the host.
func Collect() {
	metrics.Read(allocated)
	if now := allocated[0].Value.Uint64(); now-collected >= growth {
		runtime.GC()
		collected = now
	}
}
