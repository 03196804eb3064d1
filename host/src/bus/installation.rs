//! The owner of streams and consumers: the installation id in their metadata keeps two databases on
//! one NATS apart.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Error, Result};
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::stream::Config;
use futures::StreamExt;

use super::Bus;
use super::streams::{EnsuredStream, StreamSpec};
use crate::model::hint::WithHint;

/// The metadata key of the installation id.
const INSTALLATION: &str = "oncely.installation";

/// The installation that a bus works for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    id: String,
    /// Another installation, whose streams and consumers this one takes over.
    take_over: Option<String>,
}

/// The error of a resource that belongs to another installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherInstallation {
    /// The resource in words, for example `the stream ONCELY_DLQ`.
    pub resource: String,
    /// The id of the other installation.
    pub owner_id: String,
    /// The id of this installation.
    pub own_id: String,
}

impl std::fmt::Display for OtherInstallation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let OtherInstallation {
            resource,
            owner_id,
            own_id,
        } = self;
        write!(
            f,
            "{resource} belongs to another installation, {owner_id}; \
             this database is installation {own_id}"
        )
    }
}

impl std::error::Error for OtherInstallation {}

impl OtherInstallation {
    fn into_error(self) -> Error {
        let hint = format!(
            "use a separate NATS account for each installation; \
             if {0} no longer exists, run: oncely run --take-over {0}",
            self.owner_id
        );
        Error::new(self).hint(hint)
    }
}

/// The owner of a resource, relative to this installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    Own,
    /// Without an owner, or owned by an installation that is being taken over.
    Unowned,
}

impl Bus {
    /// A bus that works for the installation `id` and may take over the resources of another one.
    #[must_use]
    pub fn for_installation(self, id: &str, take_over: Option<String>) -> Bus {
        Bus {
            owner: Some(Arc::new(Owner {
                id: id.to_owned(),
                take_over,
            })),
            ..self
        }
    }

    /// Adds the owner to the metadata of a stream or consumer.
    pub(super) fn set_owner(&self, metadata: &mut HashMap<String, String>) {
        if let Some(owner) = &self.owner {
            metadata.insert(INSTALLATION.to_owned(), owner.id.clone());
        }
    }

    /// The ownership of a resource with this metadata.
    ///
    /// # Errors
    /// [`OtherInstallation`] if its owner is neither this installation nor one to be taken over.
    pub(super) fn ownership(
        &self,
        resource: impl FnOnce() -> String,
        metadata: &HashMap<String, String>,
    ) -> Result<Ownership> {
        let Some(owner) = &self.owner else {
            return Ok(Ownership::Own);
        };
        match metadata.get(INSTALLATION) {
            None => Ok(Ownership::Unowned),
            Some(owner_id) if *owner_id == owner.id => Ok(Ownership::Own),
            Some(owner_id) if owner.take_over.as_ref() == Some(owner_id) => Ok(Ownership::Unowned),
            Some(owner_id) => Err(OtherInstallation {
                resource: resource(),
                owner_id: owner_id.clone(),
                own_id: owner.id.clone(),
            }
            .into_error()),
        }
    }

    /// Creates a stream owned by this installation, or claims an existing one without an owner.
    ///
    /// # Errors
    /// [`OtherInstallation`], with a hint, if another installation owns the stream.
    pub async fn ensure_own_stream(&self, spec: &StreamSpec) -> Result<EnsuredStream> {
        if self.create_stream(spec).await? == EnsuredStream::Created {
            return Ok(EnsuredStream::Created);
        }
        if let Some(mut config) = self.unowned_stream_config(&spec.name).await? {
            self.set_owner(&mut config.metadata);
            let updated = self.context.update_stream(config).await;
            updated.with_context(|| format!("record the owner of the stream {}", spec.name))?;
        }
        self.raise_replicas(&spec.name).await?;
        Ok(EnsuredStream::AlreadyExists)
    }

    /// Checks that this installation still owns a stream.
    ///
    /// # Errors
    /// [`OtherInstallation`] if another installation has taken it over.
    pub async fn check_owner(&self, stream: &str) -> Result<()> {
        self.unowned_stream_config(stream).await.map(drop)
    }

    /// The configuration of a stream without an owner; `None` if this installation owns it.
    async fn unowned_stream_config(&self, name: &str) -> Result<Option<Config>> {
        let stream = self
            .context
            .get_stream(name)
            .await
            .with_context(|| format!("query the stream {name}"))?;
        let config = &stream.cached_info().config;
        let ownership = self.ownership(|| format!("the stream {name}"), &config.metadata)?;
        Ok((ownership == Ownership::Unowned).then(|| config.clone()))
    }

    /// The consumer of this name; `None` if it does not exist.
    ///
    /// # Errors
    /// [`OtherInstallation`], with a hint, if another installation owns it.
    pub(super) async fn own_consumer(&self, stream: &str, durable: &str) -> Result<Option<Info>> {
        let Some(info) = self.consumer_info(stream, durable).await? else {
            return Ok(None);
        };
        self.ownership(
            || format!("the consumer {durable} on the stream {stream}"),
            &info.config.metadata,
        )?;
        Ok(Some(info))
    }

    /// The names of this installation's consumers on a stream.
    pub async fn own_consumers(&self, stream: &str) -> Result<Vec<String>> {
        let Some(owner) = &self.owner else {
            return Ok(Vec::new());
        };
        let context = || format!("list the consumers of {stream}");
        let stream_handle = self
            .context
            .get_stream_no_info(stream)
            .await
            .with_context(context)?;
        let mut names = Vec::new();
        let mut consumers = stream_handle.consumers();
        while let Some(consumer) = consumers.next().await {
            let consumer = consumer.with_context(context)?;
            if consumer.config.metadata.get(INSTALLATION) == Some(&owner.id) {
                names.push(consumer.name);
            }
        }
        Ok(names)
    }

    /// Removes a consumer if it exists and this installation owns it. Returns whether it existed.
    pub async fn retire_consumer(&self, stream: &str, consumer: &str) -> Result<bool> {
        let is_there = self.own_consumer(stream, consumer).await?.is_some();
        if is_there {
            self.remove_consumer(stream, consumer).await?;
        }
        Ok(is_there)
    }

    /// Removes a consumer, and with it its position on the stream.
    pub async fn remove_consumer(&self, stream: &str, consumer: &str) -> Result<()> {
        let stream_handle = self.context.get_stream_no_info(stream).await;
        let stream_handle = stream_handle.with_context(|| format!("open the stream {stream}"))?;
        let removed = stream_handle.delete_consumer(consumer).await;
        removed
            .map(drop)
            .with_context(|| format!("remove the consumer {consumer} of {stream}"))
    }
}
