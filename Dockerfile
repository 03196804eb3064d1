# The image contains the program, its libraries and certificates. It has no shell, no package
# manager and no root user.
#   docker build --build-arg ONCELY_COMMIT="$(git rev-parse --short=12 HEAD)" --tag oncely .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
ARG ONCELY_COMMIT=
RUN cargo build --locked --profile dist --bin oncely \
    && scripts/image-tree target/dist/oncely /image

FROM scratch
COPY --from=build /image /
USER 65532:65532
WORKDIR /var/lib/oncely
VOLUME /var/lib/oncely
# The control API is reachable from other containers, so ONCELY_TOKEN is required. Publish its port
# only where it is needed.
ENV ONCELY_DATA_DIR=/var/lib/oncely ONCELY_LISTEN=0.0.0.0:7420 ONCELY_HTTP=0.0.0.0:7480 ONCELY_LOG_FORMAT=json
EXPOSE 7420 7480
ENTRYPOINT ["/usr/bin/oncely"]
CMD ["run"]
