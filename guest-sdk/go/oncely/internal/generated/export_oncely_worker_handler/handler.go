// Package export_oncely_worker_handler connects the generated export to the handler.
package export_oncely_worker_handler

import (
	"oncely/internal/generated/oncely_worker_types"

	types "go.bytecodealliance.org/pkg/wit/types"
)

// Handler is set by the package oncely.
var Handler func(message oncely_worker_types.Message) types.Result[types.Unit, oncely_worker_types.Failure]

// Handle is called by the generated export.
func Handle(message oncely_worker_types.Message) types.Result[types.Unit, oncely_worker_types.Failure] {
	return Handler(message)
}
