// Package wasm is Oncely as the host: the generated bindings behind the functions of the other
// packages.
package wasm

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"oncely/internal/backend"
	"oncely/internal/generated/oncely_worker_cache"
	"oncely/internal/generated/oncely_worker_invocation"
	"oncely/internal/generated/oncely_worker_outbox"
	"oncely/internal/generated/oncely_worker_sql"
	"oncely/internal/generated/oncely_worker_state"
	"oncely/internal/generated/wasi_config_store"
	"oncely/internal/generated/wasi_logging_logging"

	types "go.bytecodealliance.org/pkg/wit/types"
)

type host struct{}

func init() {
	backend.Current = host{}
	slog.SetDefault(slog.New(&logHandler{}))
}

func optional(text string) types.Option[string] {
	if text == "" {
		return types.None[string]()
	}
	return types.Some(text)
}

func milliseconds(duration time.Duration) uint64 {
	return uint64(max(0, duration+time.Millisecond-1) / time.Millisecond)
}

// Outbox

func (host) Send(message backend.Outgoing) (string, error) {
	delay := types.None[uint64]()
	if message.Delay > 0 {
		delay = types.Some(milliseconds(message.Delay))
	}
	headers := make([]types.Tuple2[string, string], len(message.Headers))
	for i, header := range message.Headers {
		headers[i] = types.Tuple2[string, string]{F0: header.Name, F1: header.Value}
	}
	Collect()
	sent := oncely_worker_outbox.Send(oncely_worker_outbox.Outgoing{
		Subject:     message.Subject,
		Headers:     headers,
		Body:        message.Body,
		Id:          optional(message.ID),
		OrderingKey: optional(message.OrderingKey),
		Delay:       delay,
		CausedBy:    types.None[string](),
	})
	if sent.IsOk() {
		return sent.Ok(), nil
	}
	refused := sent.Err()
	switch refused.Tag() {
	case oncely_worker_outbox.ErrorInvalidSubject:
		return "", refuse("invalid-subject", refused.InvalidSubject())
	case oncely_worker_outbox.ErrorInvalidHeader:
		return "", refuse("invalid-header", refused.InvalidHeader())
	case oncely_worker_outbox.ErrorInvalidId:
		return "", refuse("invalid-id", refused.InvalidId())
	case oncely_worker_outbox.ErrorNotGranted:
		return "", refuse("not-granted", refused.NotGranted())
	case oncely_worker_outbox.ErrorTooLarge:
		return "", refuse("too-large", refused.TooLarge())
	case oncely_worker_outbox.ErrorTooMany:
		return "", refuse("too-many", refused.TooMany())
	default:
		return "", refuse("other", refused.Other())
	}
}

func refuse(reason, message string) error {
	return &backend.Error{Reason: reason, Message: message}
}

// State

func stateError(refused oncely_worker_state.Error) error {
	switch refused.Tag() {
	case oncely_worker_state.ErrorInvalidKey:
		return refuse("invalid-key", refused.InvalidKey())
	case oncely_worker_state.ErrorTooLarge:
		return refuse("too-large", refused.TooLarge())
	case oncely_worker_state.ErrorTransactionFailed:
		return refuse("transaction-failed", refused.TransactionFailed())
	case oncely_worker_state.ErrorVersionMismatch:
		mismatch := &backend.Error{
			Reason:  "version-mismatch",
			Message: "version mismatch: the key does not exist",
		}
		if found := refused.VersionMismatch(); found.IsSome() {
			version := found.Some()
			mismatch.Current = &version
			mismatch.Message = fmt.Sprintf("version mismatch: the key is at version %d", version)
		}
		return mismatch
	default:
		return refuse("other", refused.Other())
	}
}

func (host) StateGet(key string) (*backend.Entry, error) {
	Collect()
	found := oncely_worker_state.Get(key)
	if found.IsErr() {
		return nil, stateError(found.Err())
	}
	if found.Ok().IsNone() {
		return nil, nil
	}
	entry := found.Ok().Some()
	return &backend.Entry{Value: entry.Value, Version: entry.Version}, nil
}

func (host) StateSet(key string, value []byte) (uint64, error) {
	Collect()
	set := oncely_worker_state.Set(key, value)
	if set.IsErr() {
		return 0, stateError(set.Err())
	}
	return set.Ok(), nil
}

func (host) StateDelete(key string) (bool, error) {
	Collect()
	deleted := oncely_worker_state.Delete(key)
	if deleted.IsErr() {
		return false, stateError(deleted.Err())
	}
	return deleted.Ok(), nil
}

func (host) StateCompareAndSet(key string, expected *uint64, value []byte) (uint64, error) {
	version := types.None[uint64]()
	if expected != nil {
		version = types.Some(*expected)
	}
	Collect()
	set := oncely_worker_state.CompareAndSet(key, version, value)
	if set.IsErr() {
		return 0, stateError(set.Err())
	}
	return set.Ok(), nil
}

// SQL

func param(value any) (oncely_worker_sql.Value, error) {
	switch value := value.(type) {
	case nil:
		return oncely_worker_sql.MakeValueNull(), nil
	case bool:
		return oncely_worker_sql.MakeValueBoolean(value), nil
	case int:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case int8:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case int16:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case int32:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case int64:
		return oncely_worker_sql.MakeValueInt64(value), nil
	case uint8:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case uint16:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case uint32:
		return oncely_worker_sql.MakeValueInt64(int64(value)), nil
	case uint:
		return unsigned(uint64(value))
	case uint64:
		return unsigned(value)
	case float32:
		return oncely_worker_sql.MakeValueFloat64(float64(value)), nil
	case float64:
		return oncely_worker_sql.MakeValueFloat64(value), nil
	case string:
		return oncely_worker_sql.MakeValueText(value), nil
	case []byte:
		return oncely_worker_sql.MakeValueBytes(value), nil
	case time.Time:
		return oncely_worker_sql.MakeValueTimestamp(value.UnixMicro()), nil
	case backend.Decimal:
		return oncely_worker_sql.MakeValueDecimal(string(value)), nil
	case backend.UUID:
		return oncely_worker_sql.MakeValueUuid(string(value)), nil
	case backend.JSON:
		return oncely_worker_sql.MakeValueJson(string(value)), nil
	case json.RawMessage:
		return oncely_worker_sql.MakeValueJson(string(value)), nil
	case backend.Date:
		return oncely_worker_sql.MakeValueDate(string(value)), nil
	case backend.TimeOfDay:
		return oncely_worker_sql.MakeValueTime(string(value)), nil
	default:
		message := fmt.Sprintf("a %T cannot be a parameter", value)
		return oncely_worker_sql.Value{}, refuse("invalid-parameter", message)
	}
}

func unsigned(value uint64) (oncely_worker_sql.Value, error) {
	if value > math.MaxInt64 {
		message := fmt.Sprintf("%d does not fit into 64 bits; use a Decimal", value)
		return oncely_worker_sql.Value{}, refuse("invalid-parameter", message)
	}
	return oncely_worker_sql.MakeValueInt64(int64(value)), nil
}

func column(value oncely_worker_sql.Value) any {
	switch value.Tag() {
	case oncely_worker_sql.ValueBoolean:
		return value.Boolean()
	case oncely_worker_sql.ValueInt64:
		return value.Int64()
	case oncely_worker_sql.ValueFloat64:
		return value.Float64()
	case oncely_worker_sql.ValueDecimal:
		return backend.Decimal(value.Decimal())
	case oncely_worker_sql.ValueText:
		return value.Text()
	case oncely_worker_sql.ValueBytes:
		return value.Bytes()
	case oncely_worker_sql.ValueUuid:
		return backend.UUID(value.Uuid())
	case oncely_worker_sql.ValueJson:
		return backend.JSON(value.Json())
	case oncely_worker_sql.ValueTimestamp:
		return time.UnixMicro(value.Timestamp()).UTC()
	case oncely_worker_sql.ValueDate:
		return backend.Date(value.Date())
	case oncely_worker_sql.ValueTime:
		return backend.TimeOfDay(value.Time())
	default:
		return nil
	}
}

func sqlError(failed oncely_worker_sql.Error) error {
	switch failed.Tag() {
	case oncely_worker_sql.ErrorConstraintViolation:
		return databaseError("constraint-violation", failed.ConstraintViolation())
	case oncely_worker_sql.ErrorConflict:
		return databaseError("conflict", failed.Conflict())
	case oncely_worker_sql.ErrorQueryFailed:
		return databaseError("query-failed", failed.QueryFailed())
	case oncely_worker_sql.ErrorNotAllowed:
		return refuse("not-allowed", failed.NotAllowed())
	case oncely_worker_sql.ErrorInvalidParameter:
		return refuse("invalid-parameter", failed.InvalidParameter())
	case oncely_worker_sql.ErrorUnsupportedType:
		return refuse("unsupported-type", failed.UnsupportedType())
	case oncely_worker_sql.ErrorTooLarge:
		return refuse("too-large", failed.TooLarge())
	case oncely_worker_sql.ErrorTimeout:
		return refuse("timeout", "the time limit of this delivery was reached")
	case oncely_worker_sql.ErrorTransactionFailed:
		return refuse("transaction-failed", failed.TransactionFailed())
	default:
		return refuse("other", failed.Other())
	}
}

func databaseError(reason string, failed oncely_worker_sql.DatabaseError) error {
	found := &backend.Error{Reason: reason, Message: failed.Message, Code: failed.Code}
	if name := failed.Constraint.SomeOr(""); !strings.Contains(failed.Message, name) {
		found.Constraint = name
	}
	return found
}

func params(values []any) ([]oncely_worker_sql.Value, error) {
	given := make([]oncely_worker_sql.Value, len(values))
	for i, value := range values {
		converted, err := param(value)
		if err != nil {
			return nil, err
		}
		given[i] = converted
	}
	return given, nil
}

func (host) Query(statement string, values []any) (backend.Rows, error) {
	given, err := params(values)
	if err != nil {
		return backend.Rows{}, err
	}
	Collect()
	found := oncely_worker_sql.Query(statement, given)
	if found.IsErr() {
		return backend.Rows{}, sqlError(found.Err())
	}
	rows := make([][]any, len(found.Ok().Rows))
	for i, row := range found.Ok().Rows {
		rows[i] = make([]any, len(row))
		for at, value := range row {
			rows[i][at] = column(value)
		}
	}
	return backend.Rows{Columns: found.Ok().Columns, Values: rows}, nil
}

func (host) Execute(statement string, values []any) (uint64, error) {
	given, err := params(values)
	if err != nil {
		return 0, err
	}
	Collect()
	changed := oncely_worker_sql.Execute(statement, given)
	if changed.IsErr() {
		return 0, sqlError(changed.Err())
	}
	return changed.Ok(), nil
}

func (host) Defer(statement string, values []any) error {
	given, err := params(values)
	if err != nil {
		return err
	}
	Collect()
	deferred := oncely_worker_sql.Defer(statement, given)
	if deferred.IsErr() {
		return sqlError(deferred.Err())
	}
	return nil
}

func (host) Dialect() string {
	if oncely_worker_sql.GetDialect() == oncely_worker_sql.DialectSqlite {
		return "sqlite"
	}
	return "postgres"
}

// Cache

func cacheError(refused oncely_worker_cache.Error) error {
	switch refused.Tag() {
	case oncely_worker_cache.ErrorInvalidKey:
		return refuse("invalid-key", refused.InvalidKey())
	case oncely_worker_cache.ErrorInvalidTag:
		return refuse("invalid-tag", refused.InvalidTag())
	case oncely_worker_cache.ErrorInvalidTtl:
		return refuse("invalid-ttl", refused.InvalidTtl())
	case oncely_worker_cache.ErrorTooLarge:
		return refuse("too-large", refused.TooLarge())
	case oncely_worker_cache.ErrorTooMany:
		return refuse("too-many", refused.TooMany())
	default:
		return refuse("other", refused.Other())
	}
}

func (host) CacheGet(key string) ([]byte, bool, error) {
	Collect()
	found := oncely_worker_cache.Get(key)
	if found.IsErr() {
		return nil, false, cacheError(found.Err())
	}
	if found.Ok().IsNone() {
		return nil, false, nil
	}
	return found.Ok().Some(), true, nil
}

func (host) CachePut(key string, value []byte, ttl time.Duration, tags []string) error {
	Collect()
	if put := oncely_worker_cache.Put(key, value, milliseconds(ttl), tags); put.IsErr() {
		return cacheError(put.Err())
	}
	return nil
}

func (host) CacheInvalidate(tags []string) error {
	Collect()
	if dropped := oncely_worker_cache.Invalidate(tags); dropped.IsErr() {
		return cacheError(dropped.Err())
	}
	return nil
}

// Configuration and the current delivery

func (host) Config(key string) (string, bool) {
	Collect()
	found := wasi_config_store.Get(key)
	if found.IsErr() || found.Ok().IsNone() {
		return "", false
	}
	return found.Ok().Some(), true
}

func (host) InvocationID() string { return oncely_worker_invocation.Id() }
func (host) Worker() string       { return oncely_worker_invocation.Worker() }
func (host) Version() uint32      { return oncely_worker_invocation.Version() }
func (host) Attempt() uint32      { return oncely_worker_invocation.Attempt() }
func (host) MaxAttempts() uint32  { return oncely_worker_invocation.MaxAttempts() }

func (host) Now() time.Time {
	return time.UnixMicro(int64(oncely_worker_invocation.Now())).UTC()
}

func (host) Remaining() time.Duration {
	return time.Duration(oncely_worker_invocation.Remaining()) * time.Millisecond
}

func (host) Traceparent() string {
	return oncely_worker_invocation.Traceparent().SomeOr("")
}

// Logging

// logHandler writes the records of log/slog as log lines of the host.
type logHandler struct {
	attributes string
	group      string
}

func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

func (h *logHandler) Handle(_ context.Context, record slog.Record) error {
	line := record.Message + h.attributes
	record.Attrs(func(attribute slog.Attr) bool {
		line += fmt.Sprintf(" %s%s=%v", h.group, attribute.Key, attribute.Value)
		return true
	})
	level := wasi_logging_logging.LevelInfo
	switch {
	case record.Level >= slog.LevelError:
		level = wasi_logging_logging.LevelError
	case record.Level >= slog.LevelWarn:
		level = wasi_logging_logging.LevelWarn
	}
	wasi_logging_logging.Log(level, "", line)
	return nil
}

func (h *logHandler) WithAttrs(attributes []slog.Attr) slog.Handler {
	with := *h
	for _, attribute := range attributes {
		with.attributes += fmt.Sprintf(" %s%s=%v", h.group, attribute.Key, attribute.Value)
	}
	return &with
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	with := *h
	with.group += name + "."
	return &with
}
