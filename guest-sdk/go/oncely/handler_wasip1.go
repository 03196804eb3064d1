package oncely

import (
	"time"

	export "oncely/internal/generated/export_oncely_worker_handler"
	"oncely/internal/generated/oncely_worker_types"
	_ "oncely/internal/generated/wit_exports"
	"oncely/internal/wasm"

	types "go.bytecodealliance.org/pkg/wit/types"
)

func init() {
	export.Handler = handle
}

func handle(given oncely_worker_types.Message) types.Result[types.Unit, oncely_worker_types.Failure] {
	wasm.Collect()
	message := Message{
		ID:      given.Id,
		Subject: given.Subject,
		Body:    given.Body,
		Headers: make([]Header, len(given.Headers)),
	}
	for i, header := range given.Headers {
		message.Headers[i] = Header{Name: header.F0, Value: header.F1}
	}
	if given.Origin.IsSome() {
		origin := given.Origin.Some()
		message.Origin = &Origin{
			Stream:   origin.Stream,
			Sequence: origin.Sequence,
			StoredAt: time.UnixMicro(int64(origin.StoredAt)).UTC(),
		}
	}
	err := Deliver(message)
	if err == nil {
		return types.Ok[types.Unit, oncely_worker_types.Failure](types.Unit{})
	}
	return types.Err[types.Unit](failure(AsFailure(err)))
}

func failure(given *Failure) oncely_worker_types.Failure {
	kind := oncely_worker_types.MakeFailureKindRetry()
	switch given.Kind {
	case KindReject:
		kind = oncely_worker_types.MakeFailureKindReject()
	case KindRetryAfter:
		milliseconds := max(0, given.Delay+time.Millisecond-1) / time.Millisecond
		kind = oncely_worker_types.MakeFailureKindRetryAfter(uint64(milliseconds))
	}
	code := types.None[string]()
	if given.Code != "" {
		code = types.Some(given.Code)
	}
	return oncely_worker_types.Failure{Kind: kind, Code: code, Message: given.Message}
}
